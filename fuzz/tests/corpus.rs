//! Every target over its corpus, and over some inputs of a fixed generator: what was once found stays found, and
//! the targets themselves do not rot.

use std::path::Path;

/// Inputs made up per target, and bytes of the longest.
const MADE_UP: u64 = 64;
const LONGEST: u64 = 1024;

fn run(name: &str) {
    let target = husk_fuzz::target(name).expect("a target");
    let directory = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("corpus")
        .join(name);
    let mut paths: Vec<_> = std::fs::read_dir(&directory)
        .unwrap_or_else(|e| panic!("{}: {e}", directory.display()))
        .map(|entry| entry.expect("an entry").path())
        .collect();
    paths.sort();
    assert!(!paths.is_empty(), "{} is empty", directory.display());
    // All of them first: a target may hide /tmp from this thread, and the corpus may be there.
    let read = |path: std::path::PathBuf| (std::fs::read(&path).expect("read an input"), path);
    let inputs: Vec<_> = paths.into_iter().map(read).collect();
    for (input, path) in inputs {
        // Shown where it does not come back.
        eprintln!("{}", path.display());
        target(&input);
    }
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut random = || {
        // xorshift64 (Marsaglia, 2003).
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    for number in 0..MADE_UP {
        eprintln!("made up, {number}");
        let length = random() % LONGEST;
        let input: Vec<u8> = (0..length).map(|_| (random() >> 32) as u8).collect();
        target(&input);
    }
}

macro_rules! targets {
    ($($name:ident)*) => {
        $(#[test]
        fn $name() {
            run(stringify!($name));
        })*

        #[test]
        fn all_are_here() {
            assert_eq!(husk_fuzz::names(), [$(stringify!($name)),*]);
        }
    };
}

targets!(queue pci vsock net fs machine image agent shim);
