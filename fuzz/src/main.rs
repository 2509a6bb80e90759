//! With libFuzzer (`make fuzz`): fuzzes the target that `HUSK_FUZZ_TARGET` names. Without: runs files that were
//! found before, `husk-fuzz TARGET FILE…`.

#![cfg_attr(fuzzing, no_main)]

#[cfg(fuzzing)]
mod fuzzer {
    use std::sync::OnceLock;

    use husk_fuzz::Target;

    static TARGET: OnceLock<Target> = OnceLock::new();

    fn named() -> Target {
        let name = std::env::var("HUSK_FUZZ_TARGET").unwrap_or_default();
        husk_fuzz::target(&name).unwrap_or_else(|| {
            eprintln!(
                "HUSK_FUZZ_TARGET: {name:?} is none of {:?}",
                husk_fuzz::names()
            );
            std::process::exit(2)
        })
    }

    libfuzzer_sys::fuzz_target!(|data: &[u8]| TARGET.get_or_init(named)(data));
}

#[cfg(not(fuzzing))]
fn main() {
    let mut arguments = std::env::args().skip(1);
    let name = arguments.next().unwrap_or_default();
    let Some(run) = husk_fuzz::target(&name) else {
        eprintln!(
            "usage: husk-fuzz TARGET FILE…, where TARGET is one of {:?}",
            husk_fuzz::names()
        );
        std::process::exit(2)
    };
    for path in arguments {
        println!("{path}");
        run(&std::fs::read(&path).expect("read the file"));
    }
}
