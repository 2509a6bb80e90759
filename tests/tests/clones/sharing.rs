//! What clones have in common, memory, and what they never see of each other.

use std::{fs, os::unix::fs::MetadataExt, path::Path, time::Instant};

use husk_tests::{
    command::{PATIENCE, eventually},
    ctr::{Container, Runtime},
    templates::{Log, Templates, husk_template},
};

/// Of the template's pages, so many hundredths are to be shared by all clones.
const SHARED: u64 = 80;

/// What /proc/PID/smaps says of a clone's mappings of its template's memory, kB.
#[derive(Debug, Default)]
struct Mapped {
    size: u64,
    rss: u64,
    shared: u64,
    private: u64,
    /// Copied because it was written to.
    anonymous: u64,
}

impl Mapped {
    fn of(pid: u32, memory: &Path) -> Self {
        let inode = fs::metadata(memory).expect("the memory file").ino();
        let smaps = fs::read_to_string(format!("/proc/{pid}/smaps")).expect("smaps");
        let mut mapped = Mapped::default();
        let mut ours = false;
        for line in smaps.lines() {
            let words: Vec<&str> = line.split_whitespace().collect();
            match words.as_slice() {
                [name, kb, "kB"] if ours => {
                    let kb: u64 = kb.parse().expect("a number");
                    match *name {
                        "Size:" => mapped.size += kb,
                        "Rss:" => mapped.rss += kb,
                        "Shared_Clean:" | "Shared_Dirty:" => mapped.shared += kb,
                        "Private_Clean:" | "Private_Dirty:" => mapped.private += kb,
                        "Anonymous:" => mapped.anonymous += kb,
                        _ => {}
                    }
                }
                [_range, _flags, _offset, _device, number, ..] if number.parse() == Ok(inode) => {
                    ours = true;
                }
                [range, ..] if range.contains('-') => ours = false,
                _ => {}
            }
        }
        mapped
    }
}

#[test]
fn clones_share_most_of_their_templates_pages() {
    let templates = Templates::built();
    let memory = templates.only().join("memory");
    let log = Log::from_now();
    let pods = [(); 2].map(|()| Container::idle(Runtime::Husk));
    let data = fs::metadata(&memory).expect("the memory file").blocks() / 2;
    for pod in &pods {
        assert!(log.is_clone(&pod.id));
        let mapped = Mapped::of(pod.pid(), &memory);
        println!("of {data} kB in the template: {mapped:?}");
        // All that is in the template is mapped, and nothing that is not.
        assert!(mapped.size >= data, "{mapped:?}");
        let kept = mapped.size - mapped.anonymous;
        assert!(kept * 100 >= mapped.size * SHARED, "{mapped:?}");
        // What is there and was not written to is the same physical page in both.
        let clean = mapped.rss - mapped.anonymous;
        assert!(
            clean > 0 && mapped.shared * 100 >= clean * SHARED,
            "{mapped:?}"
        );
    }
}

#[test]
fn what_one_clone_writes_no_other_sees() {
    const FILE: &str = "/dev/shm/file";
    let _templates = Templates::built();
    let log = Log::from_now();
    let pods = [(); 3].map(|()| Container::idle(Runtime::Husk));
    let script = format!("head -c 16777216 /dev/urandom >{FILE} && md5sum <{FILE}");
    // In two of them much is written, and something else.
    let sums = [0, 1].map(|pod: usize| pods[pod].exec(&["sh", "-c", &script]).ok());
    assert_ne!(sums[0], sums[1]);
    assert_ne!(pods[2].exec(&["cat", FILE]).code(), 0);
    let late = Container::idle(Runtime::Husk);
    assert_ne!(late.exec(&["cat", FILE]).code(), 0);
    for (pod, sum) in pods.iter().zip(&sums) {
        assert_eq!(
            pod.exec(&["sh", "-c", &format!("md5sum <{FILE}")]).ok(),
            *sum
        );
    }
    for pod in pods.iter().chain([&late]) {
        assert!(log.is_clone(&pod.id));
    }
    // It reads every byte, and would name what it finds.
    assert_eq!(husk_template(&["gc"]).ok(), "");
}

/// A pod has what it started with for as long as it runs.
#[test]
fn clones_outlive_their_template() {
    let templates = Templates::built();
    let log = Log::from_now();
    let pod = Container::idle(Runtime::Husk);
    assert!(log.is_clone(&pod.id));
    let sum = pod.exec(&["md5sum", "/bin/busybox"]).ok();
    let directory = templates.only();
    husk_template(&["rm", "--all"]).ok();
    let gone = eventually(Instant::now() + PATIENCE, || {
        (!directory.exists()).then_some(())
    });
    assert!(gone.is_some());
    fs::write("/proc/sys/vm/drop_caches", "3").expect("drop caches");
    assert_eq!(pod.exec(&["md5sum", "/bin/busybox"]).ok(), sum);
}
