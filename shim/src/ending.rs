//! How a container ends, and with the last one its pod: out of the guest, off the shim's books, and
//! nothing left on the host.

use std::{sync::Arc, time::Duration};

use containerd_shim_protos::{api::DeleteResponse, events::task::TaskDelete};
use husk_proto::agent as api;
use tokio::time::{Instant, sleep, timeout};
use ttrpc::{Code, context};

use crate::{
    events::{TaskEvent, timestamp},
    fault::Fault,
    pod::{ANSWER, Containers, DRAIN, Pod},
    record,
    vm::Vm,
};

/// A shim without containers waits this long to be told to shut down.
const LINGER: Duration = Duration::from_secs(20);
/// At its end it goes after this time if nobody tells it to.
const PARTING: Duration = Duration::from_secs(1);

impl Containers {
    /// A container is out of the guest. Says whether no other is in it, in which case none will ever
    /// be again, and which shares it had. Decided only now: while the guest was deleting it, others may
    /// have come, or gone.
    fn leave(&mut self, id: &str) -> (bool, Vec<String>) {
        let Some(container) = self.by_id.get_mut(id) else {
            return (false, Vec::new());
        };
        container.gone = true;
        let shares = std::mem::take(&mut container.shares);
        let last = self.by_id.values().all(|container| container.gone);
        self.closed |= last;
        (last, shares)
    }
}

impl Pod {
    /// Takes back a `Create` that failed.
    pub(crate) async fn abandon(self: &Arc<Self>, id: &str, patience: Duration) {
        if let Some(vm) = self.vm() {
            self.remove_from_guest(vm, id).await;
        }
        self.run_last_hooks(id, patience).await;
        self.containers().by_id.remove(id);
        self.linger(LINGER);
    }

    /// Takes a container out of the guest, and the guest away if it was the last.
    async fn remove_from_guest(&self, vm: &Vm, id: &str) {
        let in_guest = self.with(id, |container| Ok(container.in_guest));
        if matches!(in_guest, Ok(true)) && !vm.has_ended() {
            // Also brings what the guest has written to the host.
            let request = api::DeleteRequest {
                container_id: id.to_owned(),
                ..api::DeleteRequest::default()
            };
            match vm
                .agent
                .delete(context::with_duration(ANSWER), &request)
                .await
            {
                Ok(_) => {}
                Err(e) => match Fault::of_call("delete the container in the guest", e) {
                    fault if fault.code == Code::NOT_FOUND => {}
                    fault => log::warn!("{fault}"),
                },
            }
        }
        let (last, shares) = self.containers().leave(id);
        if last {
            vm.stop().await;
        } else if !vm.has_ended() {
            for share in shares {
                if let Err(fault) = vm.machine.unshare(share).await {
                    log::warn!("{fault}");
                }
            }
        }
    }

    /// `Delete` of a container whose init has ended. Hooks get `patience`.
    pub async fn delete(
        self: &Arc<Self>,
        id: &str,
        patience: Duration,
    ) -> Result<DeleteResponse, Fault> {
        self.end_if_never_started(id).await?;
        let (pid, exit, streams) = self.with(id, |container| {
            if container.deleting {
                return Err(Fault::precondition(format_args!(
                    "container {id} is being deleted"
                )));
            }
            let exit = container.init.exit().ok_or_else(|| {
                Fault::precondition(format_args!("container {id} is running: kill it first"))
            })?;
            container.deleting = true;
            let mut streams = vec![std::mem::take(&mut container.init.streams)];
            for exec in container.execs.values_mut() {
                streams.push(std::mem::take(&mut exec.streams));
            }
            Ok((container.pid, exit, streams))
        })?;
        let deadline = Instant::now() + DRAIN;
        for stream in streams {
            stream.drain(deadline).await;
        }
        if let Some(vm) = self.vm() {
            self.remove_from_guest(vm, id).await;
        }
        self.run_last_hooks(id, patience).await;
        {
            let mut containers = self.containers();
            containers.by_id.remove(id);
            self.publish([TaskEvent::Delete(TaskDelete {
                container_id: id.to_owned(),
                pid,
                exit_status: exit.status,
                exited_at: timestamp(exit.at),
                ..TaskDelete::default()
            })]);
        }
        if id != self.identity.id {
            if let Err(e) = record::remove(&self.record_of(id)) {
                log::warn!("remove the record of container {id}: {e}");
            }
        }
        self.linger(LINGER);
        Ok(DeleteResponse {
            pid,
            exit_status: exit.status,
            exited_at: timestamp(exit.at),
            ..DeleteResponse::default()
        })
    }

    /// A container that was created and never started is killed by its deletion.
    async fn end_if_never_started(&self, id: &str) -> Result<(), Fault> {
        let waiter = self.with(id, |container| {
            let created = container.init.is_created();
            Ok(created.then(|| container.init.subscribe()))
        })?;
        let Some(mut exited) = waiter else {
            return Ok(());
        };
        // Whatever the guest answers: its end is seen to.
        let killed = self.kill(id, "", libc::SIGKILL as u32, true).await;
        let end = timeout(ANSWER, exited.wait_for(Option::is_some)).await;
        match end {
            Ok(Ok(_)) => Ok(()),
            _ => killed
                .and_then(|()| Err(Fault::internal(format_args!("container {id} does not end")))),
        }
    }

    /// `Shutdown`: everything of the pod goes, if nothing runs in it and no sandbox is to be remembered. The caller tells
    /// `over` when it has its answer, not before: the server's end would take that with it.
    pub async fn shutdown(self: &Arc<Self>) -> bool {
        {
            let mut containers = self.containers();
            if !containers.by_id.is_empty() || self.sandbox().is_some() {
                return false;
            }
            containers.closed = true;
        }
        let ahead = self.ahead().take();
        if let Some(ahead) = ahead {
            ahead.cancel().await;
        }
        if let Some(vm) = self.vm() {
            vm.stop().await;
        }
        if let Err(e) = record::remove(&self.record_of(&self.identity.id)) {
            log::warn!("remove the pod's record: {e}");
        }
        let _ = std::fs::remove_file(&self.identity.socket);
        // Should whoever asked be gone, and have taken its answer's place with it.
        let pod = self.clone();
        tokio::spawn(async move {
            sleep(PARTING).await;
            pod.over.notify_one();
        });
        true
    }

    /// Sees to it that a shim which nobody remembers does not stay: it leaves if it has no container
    /// after `limit`.
    pub(crate) fn linger(self: &Arc<Self>, limit: Duration) {
        let pod = self.clone();
        tokio::spawn(async move {
            sleep(limit).await;
            if pod.shutdown().await {
                pod.over.notify_one();
                log::info!("no container and no request to shut down: leaving");
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{container::Container, process::Process, stdio::Paths};

    #[test]
    fn the_last_to_leave_the_guest_closes_the_pod() {
        let mut containers = Containers::default();
        for id in ["a", "b"] {
            let container = Container::new(id, "/b", Process::creating(Paths::default()));
            containers.by_id.insert(id.into(), container);
        }
        // Both deleted at once: neither is off the books when the other leaves.
        containers.by_id.get_mut("b").unwrap().shares = vec!["c1-rootfs".into()];
        assert_eq!(containers.leave("a"), (false, Vec::new()));
        assert!(!containers.closed);
        assert_eq!(containers.leave("b"), (true, vec!["c1-rootfs".into()]));
        assert!(containers.closed);
        assert_eq!(containers.leave("c"), (false, Vec::new()));
    }
}
