//! husk's configuration file, for the length of one test.

use std::{fs, io::ErrorKind, path::Path};

const FILE: &str = "/etc/husk/config.toml";

/// What the lab has where nobody says otherwise: its CPU is software, and its host may be busy.
pub const CLONES: &str = "agent_timeout_ms = 60000\ntemplates = \"namespace\"\n";
/// The same for pods that boot.
pub const COLD: &str = "agent_timeout_ms = 60000\ntemplates = \"off\"\n";

/// A file of the test's own, with the lab's settings where it says nothing; what was there before is put back when
/// this is dropped.
pub struct Settings {
    before: Option<Vec<u8>>,
}

impl Settings {
    #[track_caller]
    pub fn write(text: &str) -> Self {
        let before = present();
        let mut settings = text.to_owned();
        let lab = String::from_utf8_lossy(before.as_deref().unwrap_or_default());
        for line in lab.lines() {
            let key = line.split(' ').next().unwrap_or_default();
            if !text.contains(key) {
                settings.push_str(line);
                settings.push('\n');
            }
        }
        replace(&settings);
        Settings { before }
    }

    /// Nothing but `text`, whatever was there before.
    #[track_caller]
    pub fn only(text: &str) -> Self {
        let before = present();
        replace(text);
        Settings { before }
    }
}

#[track_caller]
fn present() -> Option<Vec<u8>> {
    match fs::read(FILE) {
        Ok(bytes) => Some(bytes),
        Err(error) if error.kind() == ErrorKind::NotFound => None,
        Err(error) => panic!("read {FILE}: {error}"),
    }
}

#[track_caller]
fn replace(settings: &str) {
    let directory = Path::new(FILE).parent().expect("absolute");
    fs::create_dir_all(directory).expect("create /etc/husk");
    fs::write(FILE, settings).expect("write /etc/husk/config.toml");
}

impl Drop for Settings {
    fn drop(&mut self) {
        let _ = match &self.before {
            Some(bytes) => fs::write(FILE, bytes),
            None => fs::remove_file(FILE),
        };
    }
}
