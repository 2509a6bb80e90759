//! A container by its whole specification: `ctr run --config`, with a field changed, under husk or runc.

use std::{fs, path::PathBuf, process::Command};

use serde_json::{Value, json};

use crate::{
    command::{self, Outcome},
    ctr::{Container, IMAGE, Runtime, ctr, fresh_id},
};

/// A root filesystem and a config.json to be changed; gone with this value.
pub struct Bundle {
    root: PathBuf,
    pub spec: Value,
}

impl Bundle {
    /// The image's files, containerd's default specification, and `args` to run.
    ///
    /// # Panics
    /// When containerd does not give these.
    #[track_caller]
    pub fn new(args: &[&str]) -> Self {
        let root = PathBuf::from("/var/tmp").join(fresh_id("bundle"));
        fs::create_dir_all(&root).expect("create a root");
        let path = root.display().to_string();
        command::run(&mut ctr(&["image", "mount", "--rw", IMAGE, &path]), b"").ok();
        let text = command::run(&mut ctr(&["oci", "spec"]), b"").ok();
        let mut spec: Value = serde_json::from_str(&text).expect("a specification");
        spec["root"] = json!({"path": root});
        spec["process"]["args"] = json!(args);
        spec["process"]["terminal"] = json!(false);
        let path = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
        spec["process"]["env"] = json!([path]);
        Self { root, spec }
    }

    /// `ctr run --rm --config …`
    #[track_caller]
    pub fn run(&self, runtime: Runtime) -> Outcome {
        let id = fresh_id("spec");
        command::run(&mut self.command(&["--rm"], runtime, &id), b"")
    }

    /// `ctr run FLAGS --config … ID`
    #[track_caller]
    pub fn command(&self, flags: &[&str], runtime: Runtime, id: &str) -> Command {
        let config = self.root.with_extension("json");
        let mut spec = self.spec.clone();
        // containerd's own default is the same for all.
        spec["linux"]["cgroupsPath"] = json!(format!("/default/{id}"));
        fs::write(&config, spec.to_string()).expect("write the specification");
        let mut command = ctr(&["run", "--runtime", runtime.name(), "--config"]);
        command.arg(config).args(flags).arg(id);
        command
    }

    /// `ctr run -d --null-io --config …`
    #[track_caller]
    pub fn detached(&self, runtime: Runtime) -> Container {
        let container = Container {
            id: fresh_id("spec"),
        };
        let mut command = self.command(&["-d", "--null-io"], runtime, &container.id);
        command::run(&mut command, b"").ok();
        container
    }

    /// The same under husk as under runc: what it says, and its status.
    #[track_caller]
    pub fn assert_equals_runc(&self) -> Outcome {
        let [husk, runc] = [Runtime::Husk, Runtime::Runc].map(|runtime| self.run(runtime));
        // Whether a core is kept is the lab's business, which takes all of its kernel's.
        let err = |outcome: &Outcome| outcome.err().replace(" (core dumped)", "");
        let all = |outcome: &Outcome| (outcome.code(), outcome.out(), err(outcome));
        assert_eq!(all(&husk), all(&runc), "husk is not runc");
        husk
    }
}

impl Drop for Bundle {
    fn drop(&mut self) {
        let path = self.root.display().to_string();
        let _ = ctr(&["image", "unmount", "--rm", &path]).output();
        let _ = fs::remove_dir(&self.root);
        let _ = fs::remove_file(self.root.with_extension("json"));
    }
}
