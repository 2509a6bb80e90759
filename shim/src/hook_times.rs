//! When a container's hooks are run, and what becomes of it if they fail. What a hook is, is in `hooks`.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use ttrpc::Code;

use crate::{
    fault::Fault,
    hooks::{self, Hooks, Kind},
    pod::Pod,
    vm::Vm,
};

impl Pod {
    /// The hooks that are run before there is a container in the guest; and those that are run at its end are due
    /// from here on.
    pub(crate) async fn run_first_hooks(
        &self,
        id: &str,
        vm: &Vm,
        hooks: Hooks,
        patience: Duration,
    ) -> Result<(), Fault> {
        let hooks = Arc::new(hooks);
        let subject = self.with(id, |container| {
            container.pid = vm.pid;
            container.hooks = hooks.clone();
            Ok(container.subject())
        })?;
        hooks::note_due(&self.record_of(id), &hooks, &subject).map_err(Fault::internal)?;
        let deadline = Instant::now() + patience;
        for kind in [Kind::Prestart, Kind::CreateRuntime] {
            let left = deadline.saturating_duration_since(Instant::now());
            let ran = hooks.run(kind, &subject, left).await;
            ran.map_err(|e| Fault::new(Code::UNKNOWN, e))?;
        }
        Ok(())
    }

    /// The hooks that are run once a container's program runs, which is killed if one fails: so says the
    /// specification from 1.2.1 on, and so did runc whatever it said.
    pub(crate) async fn run_poststart(
        self: &Arc<Self>,
        id: &str,
        patience: Duration,
    ) -> Result<(), Fault> {
        let hooks = self.with(id, |container| {
            Ok((container.hooks.clone(), container.subject()))
        });
        // Deleted meanwhile, by somebody who did not wait for the answer.
        let Ok((hooks, subject)) = hooks else {
            return Ok(());
        };
        let ran = hooks.run(Kind::Poststart, &subject, patience).await;
        let Err(failed) = ran else {
            return Ok(());
        };
        let killed = self.kill(id, "", libc::SIGKILL.unsigned_abs(), true).await;
        match killed {
            // It has ended by itself, or is gone.
            Err(fault) if fault.code != Code::NOT_FOUND => {
                log::warn!("kill container {id}, whose hook has failed: {fault}");
            }
            _ => {}
        }
        Err(Fault::new(Code::UNKNOWN, failed))
    }

    /// The hooks that are run when nothing of a container is left in the guest. They cannot change that it is
    /// going, and nobody but the log is told if they fail.
    pub(crate) async fn run_last_hooks(&self, id: &str, patience: Duration) {
        let hooks = self.with(id, |container| {
            Ok((std::mem::take(&mut container.hooks), container.subject()))
        });
        if let Ok((hooks, subject)) = hooks {
            if !hooks.is_empty() {
                // First: run twice would be worse than cut short.
                hooks::forget_due(&self.record_of(id));
                hooks.run_all(Kind::Poststop, &subject, patience).await;
            }
        }
    }
}
