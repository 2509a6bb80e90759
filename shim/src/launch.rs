//! How a pod's VM comes to run: as a clone of a template if there is a fit one, or else by booting.
//! Whatever is wrong with a template costs one line in the log and some time, never the pod.
//!
//! The VMM is started first, since everything else here is short and can be done while it comes up.

use std::{
    fs::File,
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
    sync::Arc,
};

use tokio::{sync::mpsc, time::timeout};

use crate::{
    config::Config,
    fault::Fault,
    machine::{Added, BootImage, RestoreError, SavedImage},
    spec::Network,
    templates::{
        Ingredients, Key, Scope, Store, Template, background,
        store::{Identity, Unusable},
    },
    timeline::Timeline,
    vm::{Growth, GuestEvent, Vm, unanswered},
    vmm::Place,
};

/// A clone gets this part of `agent_timeout`, so that there is as much left for booting after all.
const CLONES_SHARE: u32 = 2;

/// What a VM is made of.
pub struct Setup {
    pub config: Config,
    pub network: Network,
    /// Below the root of cgroup v2.
    pub cgroup: PathBuf,
    /// Whether this process is to be there, too.
    pub with_shim: bool,
    /// Of the VMM's process.
    pub oom_score_adj: i64,
    /// Whose templates it may start from; none for a VM that has to boot.
    pub scope: Option<Scope>,
    pub timeline: Arc<Timeline>,
}

/// A VM whose guest runs.
#[derive(Debug)]
pub struct Launched {
    pub vm: Arc<Vm>,
    /// What the guest says; closes at its end.
    pub events: mpsc::Receiver<GuestEvent>,
    /// What a template would have to be made of, where there was none.
    pub wanted: Option<Ingredients>,
}

/// Starts a VM. If it boots, the guest boots on while this returns; a clone's agent has answered.
pub async fn launch(setup: &Setup) -> Result<Launched, Fault> {
    let kvm = open("KVM", Path::new("/dev/kvm"), true)?;
    let network = match &setup.network {
        Network::New => None,
        Network::Existing(path) => Some((path, open("network namespace", path, false)?)),
    };
    let network = network.as_ref().map(|(path, fd)| (path.as_path(), fd));
    let start = || {
        let place = Place {
            cgroup: &setup.cgroup,
            with_shim: setup.with_shim,
        };
        let started = Vm::start(&setup.config, network, place, setup.oom_score_adj);
        setup.timeline.mark("vmm");
        started
    };
    let (vm, agent) = start()?;
    let (template, wanted) = look_up(setup);
    let Some(template) = template else {
        let events = boot(setup, &vm, &kvm, agent).await?;
        return connected(setup, Launched { vm, events, wanted }).await;
    };
    let why = match restore(setup, &vm, &kvm, &agent, &template).await {
        Ok(added) => {
            drop(agent);
            match greet_clone(setup, &vm, &template, added).await {
                Ok(events) => return connected(setup, Launched { vm, events, wanted }).await,
                Err(why) => why,
            }
        }
        Err(why) => {
            log::warn!("template {}: {why}: booting instead", template.key);
            match boot(setup, &vm, &kvm, agent).await {
                Ok(events) => return connected(setup, Launched { vm, events, wanted }).await,
                Err(fault) => {
                    distrust(setup, &template);
                    fault
                }
            }
        }
    };
    drop(template);
    log::warn!("the clone's VM is given up ({why}): booting in a new one");
    let (vm, agent) = start()?;
    let events = boot(setup, &vm, &kvm, agent).await?;
    connected(setup, Launched { vm, events, wanted }).await
}

/// Plugs the pod's network into a guest that runs, and has it set without waiting for it: `Create` does. If that
/// fails, the VM is gone when this returns.
async fn connected(setup: &Setup, launched: Launched) -> Result<Launched, Fault> {
    let vm = &launched.vm;
    if setup.network == Network::New {
        return Ok(launched);
    }
    if let Err(fault) = vm.plug_network().await {
        vm.stop().await;
        return Err(fault);
    }
    setup.timeline.mark("plugged");
    let (vm, timeline) = (vm.clone(), setup.timeline.clone());
    tokio::spawn(async move {
        // Whoever needs it asks again, and hears what is wrong.
        if vm.set_network().await.is_ok() {
            timeline.mark("network");
            vm.follow_network();
        }
    });
    Ok(launched)
}

/// The template to start from, or what one would have to be made of.
fn look_up(setup: &Setup) -> (Option<Template>, Option<Ingredients>) {
    let Some(scope) = &setup.scope else {
        return (None, None);
    };
    let made_of = match Ingredients::gather(&setup.config, scope.clone()) {
        Ok(made_of) => made_of,
        Err(e) => {
            log::warn!("no template: {e}");
            return (None, None);
        }
    };
    let store = Store::new(&setup.config.template_dir);
    match store.open(&made_of) {
        Ok(Some(template)) => (Some(template), None),
        Ok(None) => (None, Some(made_of)),
        // Neither the templates' fault nor mended by another.
        Err(Unusable::Place(why)) => {
            log::warn!("no template: {why}");
            (None, None)
        }
        Err(Unusable::Template(unfit)) => {
            let key = made_of.key();
            log::warn!("template {key}: {}: booting instead", unfit.reason);
            remove(&store, &key, unfit.identity);
            // Whoever damaged it did not do so by building it: a new one may be built at once.
            background::forget(&store, &key);
            (None, Some(made_of))
        }
    }
}

fn remove(store: &Store, key: &Key, only: Identity) {
    if let Err(e) = store.remove(key, Some(only)) {
        log::warn!("remove template {key}: {e}");
    }
}

/// Has the VMM restore the template. Where it does not, it may still boot.
async fn restore(
    setup: &Setup,
    vm: &Vm,
    kvm: &OwnedFd,
    agent: &OwnedFd,
    template: &Template,
) -> Result<Added, Fault> {
    let image = SavedImage {
        kvm: kvm.as_fd(),
        memory: template.memory.as_fd(),
        state: template.state.as_fd(),
        pages: template.pages.as_ref().map(AsFd::as_fd),
        agent: agent.as_fd(),
        memory_bytes: setup.config.memory_mib << 20,
        vcpus: setup.config.vcpus,
    };
    let limit = setup.config.agent_timeout / CLONES_SHARE;
    match timeout(limit, vm.machine.restore(image)).await {
        Ok(Ok(added)) => {
            vm.booting();
            setup.timeline.mark("restored");
            Ok(added)
        }
        Ok(Err(e)) => {
            // A host that is short of something now may well run it later.
            if !matches!(e, RestoreError::Failed(_)) {
                distrust(setup, template);
            }
            Err(Fault::internal(e))
        }
        Err(_) => {
            distrust(setup, template);
            let why = unanswered("VMM", limit);
            vm.fail(why.clone()).await;
            Err(Fault::internal(why))
        }
    }
}

/// Waits for the agent of a clone. One that is silent is gone when this returns.
async fn greet_clone(
    setup: &Setup,
    vm: &Arc<Vm>,
    template: &Template,
    added: Added,
) -> Result<mpsc::Receiver<GuestEvent>, Fault> {
    let limit = setup.config.agent_timeout / CLONES_SHARE;
    let growth = Growth::of_clone(&setup.config, added);
    let events = vm.bring_up(limit, setup.timeline.clone(), growth);
    match vm.ready().await {
        Ok(()) => Ok(events),
        Err(fault) => {
            distrust(setup, template);
            Err(fault)
        }
    }
}

/// Removes a template that looked well and does not run. The next one would hardly be better, so
/// there is some time until it is built.
fn distrust(setup: &Setup, template: &Template) {
    let store = Store::new(&setup.config.template_dir);
    background::postpone(&store, &template.key);
    remove(&store, &template.key, template.identity);
}

/// Boots, on a VMM that has no guest. If that fails, the VMM is gone when this returns.
async fn boot(
    setup: &Setup,
    vm: &Arc<Vm>,
    kvm: &OwnedFd,
    agent: OwnedFd,
) -> Result<mpsc::Receiver<GuestEvent>, Fault> {
    let config = &setup.config;
    let images = match Images::open(config) {
        Ok(images) => images,
        Err(fault) => {
            vm.stop().await;
            return Err(fault);
        }
    };
    if let Err(fault) = boot_vm(vm, config, kvm, &images, &agent, 0).await {
        vm.fail(fault.message.clone()).await;
        vm.ready().await?;
        return Err(fault);
    }
    drop(agent);
    setup.timeline.mark("booted");
    Ok(vm.bring_up(config.agent_timeout, setup.timeline.clone(), None))
}

/// The files of a guest.
pub(crate) struct Images {
    kernel: OwnedFd,
    initrd: OwnedFd,
}

impl Images {
    pub(crate) fn open(config: &Config) -> Result<Self, Fault> {
        Ok(Self {
            kernel: open("the guest kernel", &config.kernel, false)?,
            initrd: open("the guest's initrd", &config.initrd, false)?,
        })
    }
}

/// Boots, and returns once the vCPUs run. The VM is the caller's to end. Its clones may have so many
/// vCPUs; 0 where there will be none.
pub(crate) async fn boot_vm(
    vm: &Vm,
    config: &Config,
    kvm: &OwnedFd,
    images: &Images,
    agent: &OwnedFd,
    possible_vcpus: u32,
) -> Result<(), Fault> {
    let image = BootImage {
        possible_vcpus,
        kvm: kvm.as_fd(),
        kernel: images.kernel.as_fd(),
        initrd: images.initrd.as_fd(),
        agent: agent.as_fd(),
    };
    let limit = config.agent_timeout;
    match timeout(limit, vm.machine.boot(config, image)).await {
        Ok(booted) => booted?,
        Err(_) => return Err(Fault::internal(unanswered("VMM", limit))),
    }
    vm.booting();
    Ok(())
}

pub(crate) fn open(what: &str, path: &Path, writable: bool) -> Result<OwnedFd, Fault> {
    let file = File::options().read(true).write(writable).open(path);
    let file =
        file.map_err(|e| Fault::internal(format_args!("open {what}, {}: {e}", path.display())))?;
    Ok(file.into())
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::*;
    use crate::cgroup;

    /// A test's own.
    fn parent_cgroup(directory: &Path) -> PathBuf {
        let name = directory.file_name().unwrap_or_default();
        PathBuf::from(format!("husk-test{}", name.to_string_lossy()))
    }

    fn setup(directory: &Path, script: &str) -> Setup {
        use std::{fs, os::unix::fs::PermissionsExt};
        let at = |name: &str, text: &str| {
            let path = directory.join(name);
            fs::write(&path, text).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
            path
        };
        let file = at("config.toml", "agent_timeout_ms = 500");
        let mut config = Config::load(&file, &Default::default()).unwrap();
        config.vmm = at("husk-vmm", &format!("#!/bin/sh\n{script}\n"));
        config.kernel = at("vmlinux", "");
        config.initrd = at("initrd.img", "");
        Setup {
            config,
            network: Network::New,
            cgroup: parent_cgroup(directory).join("vm"),
            with_shim: false,
            oom_score_adj: 0,
            scope: None,
            timeline: Arc::default(),
        }
    }

    #[tokio::test]
    async fn a_vmm_that_dies_is_explained_by_its_last_words() {
        let directory = tempfile::tempdir().unwrap();
        let setup = setup(directory.path(), "echo one >&2; echo no room >&2; exit 3");
        let fault = launch(&setup).await.unwrap_err();
        assert!(
            fault
                .message
                .starts_with("husk-vmm exited with status 3: no room (kernel ")
        );
    }

    #[tokio::test]
    async fn a_vmm_that_says_nothing_is_killed_at_the_limit() {
        let directory = tempfile::tempdir().unwrap();
        let begun = Instant::now();
        let fault = launch(&setup(directory.path(), "sleep 60"))
            .await
            .unwrap_err();
        assert!(
            fault
                .message
                .contains("the VMM did not answer within 500 ms"),
            "{fault}"
        );
        assert!(fault.message.contains("vmlinux"), "{fault}");
        assert!(begun.elapsed() < Duration::from_secs(30));
        if let Some(root) = cgroup::root() {
            assert!(!root.join(parent_cgroup(directory.path())).exists());
        }
    }

    #[tokio::test]
    async fn missing_files_are_named() {
        let directory = tempfile::tempdir().unwrap();
        let mut setup = setup(directory.path(), "exit 0");
        setup.config.kernel = "/nowhere/vmlinux".into();
        let fault = launch(&setup).await.unwrap_err();
        assert!(
            fault
                .message
                .starts_with("open the guest kernel, /nowhere/vmlinux: No such file"),
            "{fault}"
        );
    }
}
