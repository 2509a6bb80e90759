//! Which pods are clones, and of what.

use std::{
    fs::{self, File, Permissions},
    os::unix::fs::PermissionsExt,
    process::Command,
    time::Instant,
};

use husk_tests::{
    command::{self, PATIENCE, eventually},
    ctr::{Container, IMAGE, Run, Runtime, ctr, fresh_id},
    settings::Settings,
    templates::{self, Log, Templates},
};

/// A VMM that waits for a file where it would build a template.
struct Gate;

impl Gate {
    const VMM: &'static str = "/var/tmp/gated-vmm";
    const OPEN: &'static str = "/var/tmp/gated-vmm.open";

    fn shut() -> Self {
        let _ = fs::remove_file(Self::OPEN);
        let script = format!(
            "#!/bin/sh\nif grep -q husk-template /proc/self/cgroup; then\n\
             until [ -e {} ]; do sleep 0.1; done\nfi\nexec /usr/local/lib/husk/husk-vmm \"$@\"\n",
            Self::OPEN
        );
        fs::write(Self::VMM, script).expect("write the gate");
        fs::set_permissions(Self::VMM, Permissions::from_mode(0o755)).expect("chmod");
        Gate
    }

    fn open(&self) {
        File::create(Self::OPEN).expect("open the gate");
    }
}

impl Drop for Gate {
    fn drop(&mut self) {
        let _ = File::create(Self::OPEN);
    }
}

#[test]
fn the_first_pod_boots_and_waits_for_no_template_the_next_are_clones() {
    let gate = Gate::shut();
    let _settings = Settings::write(&format!("vmm = \"{}\"\n", Gate::VMM));
    let templates = Templates::none();
    let log = Log::from_now();
    let first = Container::idle(Runtime::Husk);
    let early = fresh_id("early");
    Run::husk(&["true"]).start(&early).finish().ok();
    // Both have started, and no template can have been made.
    assert!(!log.is_clone(&first.id) && !log.is_clone(&early));
    assert_eq!(templates::keys(), [""; 0]);
    gate.open();
    templates.wait_for_another(None);
    let second = Container::idle(Runtime::Husk);
    assert!(log.is_clone(&second.id));
    let third = fresh_id("third");
    assert_eq!(
        Run::husk(&["echo", "cloned"]).start(&third).finish().ok(),
        "cloned\n"
    );
    assert!(log.is_clone(&third));
    // The first one has not noticed any of it.
    first.exec(&["true"]).ok();
}

#[test]
fn switched_off_every_pod_boots_and_nothing_is_built() {
    let _templates = Templates::built();
    let _settings = Settings::write("templates = \"off\"\n");
    let before = templates::names();
    let log = Log::from_now();
    for _ in 0..2 {
        let id = fresh_id("off");
        Run::husk(&["true"]).start(&id).finish().ok();
        assert!(!log.is_clone(&id));
    }
    assert_eq!(templates::names(), before);
}

/// Runs a container in another of containerd's namespaces; says whether it was a clone.
fn is_clone_in_other_namespace(log: &Log) -> bool {
    let id = fresh_id("other");
    let mut run = Command::new("ctr");
    run.args(["-n", "other", "run", "--rm", "--runtime"]).args([
        Runtime::Husk.name(),
        IMAGE,
        &id,
        "true",
    ]);
    command::run(&mut run, b"").ok();
    log.is_clone(&id)
}

#[test]
fn who_shares_a_template_is_what_the_configuration_says() {
    command::run(
        &mut ctr(&["-n", "other", "image", "import", "/lab/demo.tar"]),
        b"",
    )
    .ok();
    let log = Log::from_now();
    {
        let _templates = Templates::built();
        assert!(!is_clone_in_other_namespace(&log));
        // It has one of its own built instead.
        let two = || (templates::keys().len() == 2).then_some(());
        assert!(eventually(Instant::now() + PATIENCE, two).is_some());
        assert!(is_clone_in_other_namespace(&log));
    }
    let _settings = Settings::write("templates = \"node\"\n");
    let _templates = Templates::built();
    assert!(is_clone_in_other_namespace(&log));
    let id = fresh_id("node");
    Run::husk(&["true"]).start(&id).finish().ok();
    assert!(log.is_clone(&id));
    assert_eq!(templates::keys().len(), 1);
}
