//! Whatever happens to a template while pods start from it: no pod fails, none is wrong, and what is
//! bad goes and is built anew.

use std::{
    fs::{self, File},
    os::unix::fs::{FileExt, MetadataExt},
    path::{Path, PathBuf},
    process::Command,
    sync::atomic::{AtomicBool, AtomicUsize, Ordering},
    thread,
    time::Instant,
};

use husk_tests::{
    command::{self, PATIENCE, eventually},
    ctr::{Run, fresh_id},
    settings::Settings,
    templates::{self, Log, Templates, husk_template},
};

/// Pods that start beside each other all the time.
const STARTERS: usize = 2;

/// A pod's work, whose outcome shows whether its memory is what it should be.
const WORK: &str = "md5sum /bin/busybox; yes husk | head -c 2000000 >/dev/shm/husk; \
                    cat /dev/shm/husk /dev/shm/husk | md5sum; echo $0";

/// Runs a pod that works, whose answer ends with its id; the rest is for the caller to compare.
#[track_caller]
fn work() -> (String, String) {
    let id = fresh_id("work");
    let outcome = Run::husk(&["sh", "-c", WORK, &id]).start(&id).finish();
    let text = outcome.ok();
    let rest = text.strip_suffix(&format!("{id}\n"));
    let rest = rest.unwrap_or_else(|| panic!("{id} said {text}"));
    (id, rest.to_owned())
}

fn run(program: &str, args: &[&str], path: &Path) {
    command::run(Command::new(program).args(args).arg(path), b"").ok();
}

fn may_be_changed(file: &Path) {
    run("chattr", &["-i"], file);
    run("chmod", &["u+w"], file);
}

/// Flips a bit in the middle.
fn flip(file: &Path) {
    may_be_changed(file);
    let file = File::options()
        .read(true)
        .write(true)
        .open(file)
        .expect("open");
    let middle = file.metadata().expect("stat").len() / 2;
    let mut byte = [0];
    file.read_exact_at(&mut byte, middle).expect("read");
    file.write_all_at(&[byte[0] ^ 4], middle).expect("write");
}

/// A template's copy, byte by byte, as a backup tool would restore it; returns it.
fn copy(template: &Path) -> PathBuf {
    let copy = PathBuf::from("/var/lib/husk/copy");
    let mut cp = Command::new("cp");
    cp.args(["-a", "--sparse=always"]).arg(template).arg(&copy);
    command::run(&mut cp, b"").ok();
    copy
}

/// Takes the directory out of the store and deletes it.
fn take_away(template: &Path) {
    let aside = Path::new("/var/lib/husk/aside");
    fs::rename(template, aside).expect("move the template away");
    run("chattr", &["-R", "-i"], aside);
    fs::remove_dir_all(aside).expect("delete it");
}

type Harm = fn(&Path);

const OF_FILES: [(&str, Harm); 5] = [
    ("state cut short", |template| {
        let state = template.join("state");
        may_be_changed(&state);
        run("truncate", &["-s", "-100"], &state);
    }),
    ("a bit of its state flipped", |template| {
        flip(&template.join("state"))
    }),
    ("memory replaced by zeroes", |template| {
        let memory = template.join("memory");
        let size = fs::metadata(&memory).expect("stat").len();
        run("chattr", &["-i"], &memory);
        fs::remove_file(&memory).expect("remove memory");
        File::create(&memory)
            .expect("create")
            .set_len(size)
            .expect("size");
    }),
    ("memory missing", |template| {
        run("chattr", &["-i"], &template.join("memory"));
        fs::remove_file(template.join("memory")).expect("remove memory");
    }),
    ("template.json garbage", |template| {
        may_be_changed(&template.join("template.json"));
        fs::write(template.join("template.json"), b"{\"version\": \xff").expect("write");
    }),
];

const OF_DIRECTORIES: [(&str, Harm); 4] = [
    ("removed by its owner", |template| {
        let key = template.file_name().and_then(|name| name.to_str());
        husk_template(&["rm", key.expect("a key")]).ok();
    }),
    ("its directory replaced by a copy", |template| {
        let copy = copy(template);
        take_away(template);
        fs::rename(copy, template).expect("put the copy there");
    }),
    ("its directory replaced by an empty one", |template| {
        take_away(template);
        fs::create_dir(template).expect("make a directory");
    }),
    ("its directory replaced by a file", |template| {
        take_away(template);
        fs::write(template, "no directory").expect("write");
    }),
];

#[test]
#[ignore = "takes minutes on a busy machine: make test-long"]
fn files_that_are_harmed_while_pods_start_harm_none_and_are_made_anew() {
    harms_none(&OF_FILES);
}

#[test]
#[ignore = "takes minutes on a busy machine: make test-long"]
fn a_template_that_goes_while_pods_start_harms_none_and_is_made_anew() {
    harms_none(&OF_DIRECTORIES);
}

#[track_caller]
fn harms_none(harm: &[(&str, Harm)]) {
    let templates = Templates::none();
    let right = work().1;
    templates.wait_for_another(None);
    for (what, harm) in harm {
        let began = Instant::now();
        let template = templates.only();
        let inode = fs::metadata(&template).expect("the template").ino();
        let (enough, started) = (AtomicBool::new(false), AtomicUsize::new(0));
        thread::scope(|scope| {
            let starters = [(); STARTERS].map(|()| {
                scope.spawn(|| {
                    while !enough.load(Ordering::Relaxed) {
                        assert_eq!(work().1, right, "{what}");
                        started.fetch_add(1, Ordering::Relaxed);
                    }
                })
            });
            // They have begun, and each goes on with its next one.
            let begun = eventually(Instant::now() + PATIENCE, || {
                (started.load(Ordering::Relaxed) >= STARTERS).then_some(())
            });
            let rebuilt = begun.is_some().then(|| {
                harm(&template);
                thread::scope(|scope| {
                    let wait = scope.spawn(|| templates.wait_for_another(Some(inode)));
                    wait.join()
                })
            });
            enough.store(true, Ordering::Relaxed);
            for starter in starters {
                assert!(starter.join().is_ok(), "{what}: a pod failed");
            }
            assert!(matches!(rebuilt, Some(Ok(_))), "{what}: not built anew");
        });
        let log = Log::from_now();
        let (id, done) = work();
        assert_eq!(done, right, "{what}");
        assert!(log.is_clone(&id), "{what}");
        println!(
            "{what}: {} pods, {:?}",
            started.into_inner(),
            began.elapsed()
        );
    }
}

/// Changes a file and what `template.json` says of it, so that only its content tells.
fn forge(template: &Path, name: &str, change: impl Fn(&Path)) {
    let file = template.join(name);
    change(&file);
    let found = fs::metadata(&file).expect("stat");
    let json = template.join("template.json");
    may_be_changed(&json);
    let text = fs::read(&json).expect("read template.json");
    let mut manifest: serde_json::Value = serde_json::from_slice(&text).expect("JSON");
    let nanoseconds = |seconds: i64, ns: i64| seconds * 1_000_000_000 + ns;
    manifest[name]["stamp"] = serde_json::json!({
        "device": found.dev(),
        "inode": found.ino(),
        "size": found.size(),
        "mtime_ns": nanoseconds(found.mtime(), found.mtime_nsec()),
        "ctime_ns": nanoseconds(found.ctime(), found.ctime_nsec()),
    });
    fs::write(&json, manifest.to_string()).expect("write template.json");
}

/// One that looks well and is not costs the pod that meets it some time, and goes.
#[track_caller]
fn costs_time_only(name: &str, change: impl Fn(&Path)) {
    let templates = Templates::built();
    let (id, right) = {
        let log = Log::from_now();
        let (id, right) = work();
        assert!(log.is_clone(&id));
        (id, right)
    };
    let template = templates.only();
    forge(&template, name, change);
    assert_eq!(templates.only(), template, "the forgery shows");
    let log = Log::from_now();
    let (forged, done) = work();
    assert_eq!(done, right, "{forged} after {id}");
    let said = log.text();
    assert!(said.contains("booting"), "{said}");
    assert!(
        !said.contains("given up"),
        "its VMM was not good for a boot: {said}"
    );
    assert_eq!(templates::keys(), [""; 0]);
    // Nor is it built again at once: whoever made it may make the same again.
    assert_eq!(work().1, right);
    assert_eq!(templates::keys(), [""; 0]);
    husk_template(&["build"]).ok();
    let log = Log::from_now();
    let (id, done) = work();
    assert_eq!(done, right);
    assert!(log.is_clone(&id));
}

#[test]
fn a_state_that_is_damaged_and_does_not_look_it() {
    costs_time_only("state", flip);
}

#[test]
fn a_memory_that_is_empty_and_does_not_look_it() {
    let _settings = Settings::write("agent_timeout_ms = 30000\n");
    costs_time_only("memory", |memory| {
        let size = fs::metadata(memory).expect("stat").len();
        let blank = memory.with_extension("blank");
        File::create(&blank)
            .expect("create")
            .set_len(size)
            .expect("size");
        run("chattr", &["-i"], memory);
        fs::rename(&blank, memory).expect("replace");
    });
}
