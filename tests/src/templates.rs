//! husk's template store, as those who run and those who harm a host see it, and what the log says
//! about starts.

use std::{
    fs::{self, File},
    io::{Read, Seek, SeekFrom},
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    process::Command,
    time::Instant,
};

use crate::command::{self, Outcome, PATIENCE, eventually};

pub const STORE: &str = "/var/lib/husk/templates";
/// Where the lab's init puts it.
const LOG: &str = "/results/containerd.log";
/// What a background builder is called with.
const BUILDER: &str = "build-template";

/// `husk template ARGS...`
#[track_caller]
pub fn husk_template(args: &[&str]) -> Outcome {
    command::run(Command::new("husk").arg("template").args(args), b"")
}

/// The store for the length of one test; empty before and after.
pub struct Templates(());

impl Templates {
    #[track_caller]
    pub fn none() -> Self {
        assert!(clear(), "the store cannot be emptied: {:?}", names());
        Templates(())
    }

    /// With the template that the next pod of ctr's namespace starts from.
    #[track_caller]
    pub fn built() -> Self {
        let templates = Self::none();
        husk_template(&["build"]).ok();
        templates
    }

    /// Waits for a template that pods can start from, other than `known`.
    #[track_caller]
    pub fn wait_for_another(&self, known: Option<u64>) -> PathBuf {
        let found = eventually(Instant::now() + PATIENCE, || {
            let fit = fit()?;
            let inode = fs::metadata(&fit).ok()?.ino();
            (Some(inode) != known).then_some(fit)
        });
        found.unwrap_or_else(|| {
            let list = husk_template(&["ls"]);
            panic!("no template: {:?}, {list:?}", names())
        })
    }

    /// The only template that there is, which pods can start from.
    #[track_caller]
    pub fn only(&self) -> PathBuf {
        fit().unwrap_or_else(|| panic!("not one fit template: {:?}", husk_template(&["ls"])))
    }
}

impl Drop for Templates {
    fn drop(&mut self) {
        if !clear() {
            eprintln!("the store cannot be emptied: {:?}", names());
        }
    }
}

/// All that is in the store.
pub fn names() -> Vec<String> {
    let entries = fs::read_dir(STORE).into_iter().flatten().flatten();
    entries
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect()
}

/// The names of templates, fit or not.
pub fn keys() -> Vec<String> {
    let mut names = names();
    names.retain(|name| !name.starts_with('.'));
    names
}

/// The one template, if `husk template ls` shows no other and calls it fit.
fn fit() -> Option<PathBuf> {
    let list = husk_template(&["ls"]);
    let mut rows = list.stdout.split(|byte| *byte == b'\n').skip(1);
    let row = String::from_utf8_lossy(rows.next()?).into_owned();
    let another = rows.any(|row| !row.is_empty());
    let shown = row.split_whitespace().next()?;
    if another || !row.trim_end().ends_with(" yes") {
        return None;
    }
    let key = keys().into_iter().find(|key| key.starts_with(shown))?;
    Some(Path::new(STORE).join(key))
}

/// Removes every template and every note on one, once nobody makes one any more.
fn clear() -> bool {
    let cleared = eventually(Instant::now() + PATIENCE, || {
        if builds() {
            return None;
        }
        let removed = husk_template(&["rm", "--all"]);
        for name in names() {
            let _ = fs::remove_file(Path::new(STORE).join(name));
        }
        (removed.code() == 0 && !builds() && names().is_empty()).then_some(())
    });
    cleared.is_some()
}

/// Whether a template is being made.
fn builds() -> bool {
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
    processes
        .filter_map(|process| fs::read(process.path().join("cmdline")).ok())
        .any(|line| {
            line.split(|byte| *byte == 0)
                .any(|arg| arg == BUILDER.as_bytes())
        })
}

/// containerd's log from a point of time on.
pub struct Log {
    from: u64,
}

impl Log {
    pub fn from_now() -> Self {
        let from = fs::metadata(LOG).map_or(0, |found| found.len());
        Log { from }
    }

    pub fn text(&self) -> String {
        let mut bytes = Vec::new();
        if let Ok(mut file) = File::open(LOG) {
            let _ = file.seek(SeekFrom::Start(self.from));
            let _ = file.read_to_end(&mut bytes);
        }
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// Whether the container, which has started a pod, is in a clone; its shim's line on it tells.
    #[track_caller]
    pub fn is_clone(&self, id: &str) -> bool {
        let line = eventually(Instant::now() + PATIENCE, || {
            let text = self.text();
            let start = format!("start of {id}, ");
            text.lines()
                .find(|line| line.contains(&start))
                .map(str::to_owned)
        });
        let line = line.unwrap_or_else(|| panic!("no start of {id} in {}", self.text()));
        let (restored, booted) = (line.contains(" restored="), line.contains(" booted="));
        assert!(restored || booted, "neither restored nor booted: {line}");
        restored && !booted
    }
}
