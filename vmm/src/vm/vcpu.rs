//! The vCPUs' threads: they run the guest, and are paused, resumed and quit together.
//!
//! A thread alternates between KVM_RUN and looking at the gate. To be heard inside KVM_RUN, the
//! gate's keeper changes it first and then sends each thread a signal, whose handler sets
//! `immediate_exit` in that thread's `kvm_run` page. If the signal arrives between the thread's look
//! at the gate and KVM_RUN, the flag makes KVM_RUN return at once: no request can be missed.
//!
//! While they are paused, errands can be run on their threads: that is how their state is saved.

use std::{
    cell::Cell,
    io,
    os::unix::thread::JoinHandleExt,
    ptr,
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU8, AtomicU64, Ordering},
        mpsc,
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use kvm_bindings::{CpuId, kvm_run};
use kvm_ioctls::{VcpuExit, VcpuFd};
use tokio::sync::watch;

use super::{
    KvmError,
    bus::GuestBus,
    ending::{Cause, Ending},
};
use crate::{
    devices,
    jail::{self, Role},
};

/// How long vCPUs may take to notice the gate. They only ever hold out in a device's code, or wait for
/// the one that does: longest where the guest resets a device whose thread waits for the host. The client
/// waits 10 s for an answer.
const GATE_TIMEOUT: Duration = Duration::from_secs(devices::fs::PATIENCE.as_secs() + 1);

/// What the vCPUs are to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
enum Gate {
    Run,
    Pause,
    Quit,
}

/// Exits to user space, by what the guest wanted.
#[derive(Debug, Default)]
pub struct Exits {
    port_reads: AtomicU64,
    port_writes: AtomicU64,
    mmio_reads: AtomicU64,
    mmio_writes: AtomicU64,
    others: AtomicU64,
}

impl Exits {
    /// All of them.
    pub fn total(&self) -> u64 {
        [
            &self.port_reads,
            &self.port_writes,
            &self.mmio_reads,
            &self.mmio_writes,
            &self.others,
        ]
        .into_iter()
        .map(|count| count.load(Ordering::Relaxed))
        .sum()
    }
}

/// A paused vCPU's thread does this once.
type Errand = Box<dyn FnOnce(&Vcpu) + Send>;

/// What the vCPUs are told.
struct Orders {
    gate: Gate,
    /// For each vCPU by index, while paused.
    errands: Vec<Option<Errand>>,
}

/// What all vCPU threads share.
struct Shared {
    orders: Mutex<Orders>,
    gate_changed: Condvar,
    /// Mirrors `gate`, for a look at it without the lock on every exit.
    glance: AtomicU8,
    /// Threads past the gate: they may run the guest.
    running: watch::Sender<usize>,
    exits: Exits,
    bus: GuestBus,
    ending: Ending,
}

/// The threads could not be paused in time.
#[derive(Debug, thiserror::Error)]
#[error("{running} vCPUs did not leave the guest within {} s", GATE_TIMEOUT.as_secs())]
pub struct StuckVcpus {
    running: usize,
}

/// The running vCPUs of one machine.
pub struct Vcpus {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

impl Vcpus {
    /// Starts a thread for each vCPU; they run the guest once all are there.
    pub(super) fn start(vcpus: Vec<Vcpu>, bus: GuestBus, ending: Ending) -> Result<Self, KvmError> {
        install_kick_handler().map_err(|cause| KvmError {
            call: "sigaction",
            cause,
        })?;
        let shared = Arc::new(Shared {
            orders: Mutex::new(Orders {
                gate: Gate::Pause,
                errands: vcpus.iter().map(|_| None).collect(),
            }),
            gate_changed: Condvar::new(),
            glance: AtomicU8::new(Gate::Pause as u8),
            running: watch::Sender::new(0),
            exits: Exits::default(),
            bus,
            ending,
        });
        let mut started = Self {
            shared,
            threads: Vec::new(),
        };
        for vcpu in vcpus {
            let shared = Arc::clone(&started.shared);
            let thread = thread::Builder::new()
                .name(format!("vcpu{}", vcpu.index))
                .stack_size(256 << 10);
            let thread =
                jail::spawn(thread, Role::Vcpu, move || vcpu.live(&shared)).map_err(|cause| {
                    KvmError {
                        call: "start a vCPU thread",
                        cause,
                    }
                });
            match thread {
                Ok(thread) => started.threads.push(thread),
                Err(e) => {
                    started.set_gate(Gate::Quit);
                    return Err(e);
                }
            }
        }
        started.set_gate(Gate::Run);
        Ok(started)
    }

    /// Stops all vCPUs; returns once none of them runs.
    pub async fn pause(&self) -> Result<(), StuckVcpus> {
        self.set_gate(Gate::Pause);
        self.all_stopped().await
    }

    /// Lets paused vCPUs run on.
    pub fn resume(&self) {
        self.set_gate(Gate::Run);
    }

    /// Ends all vCPUs for good; returns once none of them runs.
    pub async fn quit(&self) -> Result<(), StuckVcpus> {
        self.set_gate(Gate::Quit);
        self.all_stopped().await
    }

    /// Whether they were told to pause.
    pub fn paused(&self) -> bool {
        lock(&self.shared.orders).gate == Gate::Pause
    }

    /// Has every vCPU's thread do `errand`, all at the same time, and returns what came of it, by
    /// vCPU. None while they are not all paused, or when one does not answer in time.
    pub(super) fn on_each<T: Send + 'static>(
        &self,
        errand: impl Fn(&Vcpu) -> T + Clone + Send + 'static,
    ) -> Option<Vec<T>> {
        let mut orders = lock(&self.shared.orders);
        if orders.gate != Gate::Pause || *self.shared.running.borrow() != 0 {
            return None;
        }
        let mut answers = Vec::new();
        for place in &mut orders.errands {
            let (sender, answer) = mpsc::channel();
            let errand = errand.clone();
            *place = Some(Box::new(move |vcpu: &Vcpu| {
                // Whoever asked may have given up.
                let _ = sender.send(errand(vcpu));
            }));
            answers.push(answer);
        }
        drop(orders);
        self.shared.gate_changed.notify_all();
        let answers = answers.into_iter();
        let answers = answers.map(|answer| answer.recv_timeout(GATE_TIMEOUT).ok());
        answers.collect()
    }

    pub fn exits(&self) -> &Exits {
        &self.shared.exits
    }

    fn set_gate(&self, wanted: Gate) {
        let mut orders = lock(&self.shared.orders);
        if orders.gate == Gate::Quit {
            return;
        }
        orders.gate = wanted;
        self.shared.glance.store(wanted as u8, Ordering::SeqCst);
        self.shared.gate_changed.notify_all();
        drop(orders);
        if wanted == Gate::Run {
            return;
        }
        for thread in self.threads.iter().filter(|thread| !thread.is_finished()) {
            // SAFETY: the thread is not joined, so its pthread_t stays valid, finished or not.
            unsafe { libc::pthread_kill(thread.as_pthread_t(), kick_signal()) };
        }
    }

    async fn all_stopped(&self) -> Result<(), StuckVcpus> {
        let mut running = self.shared.running.subscribe();
        let stopped = running.wait_for(|running| *running == 0);
        match tokio::time::timeout(GATE_TIMEOUT, stopped).await {
            Ok(_) => Ok(()),
            Err(_) => Err(StuckVcpus {
                running: *self.shared.running.borrow(),
            }),
        }
    }
}

/// One vCPU, on its own thread.
pub(super) struct Vcpu {
    pub(super) index: usize,
    pub(super) fd: VcpuFd,
    /// As it was set: KVM changes what can be read with the guest's state.
    pub(super) cpuid: CpuId,
}

/// What follows an exit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Next {
    /// The guest goes on.
    Enter,
    /// Nothing was asked for: someone wants the gate looked at.
    Look,
    /// The machine has ended.
    End,
}

impl Vcpu {
    fn live(mut self, shared: &Shared) {
        KVM_RUN.set(ptr::from_mut(self.fd.get_kvm_run()));
        while self.pass_gate(shared) {
            let ended = self.run_guest(shared);
            shared
                .running
                .send_modify(|running| *running = running.saturating_sub(1));
            if ended {
                break;
            }
        }
        KVM_RUN.set(ptr::null_mut());
    }

    /// Runs the guest until the gate changes; true when the machine has ended.
    fn run_guest(&mut self, shared: &Shared) -> bool {
        loop {
            self.fd.set_kvm_immediate_exit(0);
            if shared.glance.load(Ordering::SeqCst) != Gate::Run as u8 {
                return self.complete_access(shared);
            }
            if self.run_once(shared) == Next::End {
                return true;
            }
        }
    }

    /// A port or MMIO access is only over when KVM_RUN is entered again, which may want another part
    /// of it: afterwards the vCPU's state is whole and can be saved.
    fn complete_access(&mut self, shared: &Shared) -> bool {
        loop {
            self.fd.set_kvm_immediate_exit(1);
            let next = self.run_once(shared);
            self.fd.set_kvm_immediate_exit(0);
            if next != Next::Enter {
                return next == Next::End;
            }
        }
    }

    /// Enters the guest once and serves its exit.
    fn run_once(&mut self, shared: &Shared) -> Next {
        let next = |or| match shared.ending.has_come() {
            true => Next::End,
            false => or,
        };
        let Shared {
            exits, bus, ending, ..
        } = shared;
        let exit = self.fd.run();
        bus.drain();
        let counter = match exit {
            Ok(VcpuExit::IoIn(port, data)) => {
                bus.read_port(port, data);
                &exits.port_reads
            }
            Ok(VcpuExit::IoOut(port, data)) => {
                bus.write_port(port, data);
                &exits.port_writes
            }
            Ok(VcpuExit::MmioRead(address, data)) => {
                bus.read_mmio(address, data);
                &exits.mmio_reads
            }
            Ok(VcpuExit::MmioWrite(address, data)) => {
                bus.write_mmio(address, data);
                &exits.mmio_writes
            }
            // A request to look at the gate.
            Ok(VcpuExit::Intr) => return next(Next::Look),
            Err(e) if [libc::EINTR, libc::EAGAIN].contains(&e.errno()) => {
                return next(Next::Look);
            }
            Ok(VcpuExit::Shutdown) => {
                let detail = self.registers();
                ending.report(Cause::TripleFault, detail);
                &exits.others
            }
            Ok(VcpuExit::InternalError) => {
                let detail = format!("{}; {}", self.internal_error(), self.registers());
                ending.report(Cause::KvmError, detail);
                &exits.others
            }
            Ok(other) => {
                let exit = format!("{other:?}");
                let detail = format!("unexpected exit {exit}; {}", self.registers());
                ending.report(Cause::KvmError, detail);
                &exits.others
            }
            Err(e) => {
                let cause = io::Error::from(e);
                let detail = format!("KVM_RUN: {cause}; {}", self.registers());
                ending.report(Cause::KvmError, detail);
                &exits.others
            }
        };
        counter.fetch_add(1, Ordering::Relaxed);
        next(Next::Enter)
    }

    /// Waits at the gate, and runs errands there; false when it says to quit. Behind it the thread
    /// counts as running.
    fn pass_gate(&self, shared: &Shared) -> bool {
        let mut orders = lock(&shared.orders);
        while orders.gate == Gate::Pause {
            let errand = orders.errands.get_mut(self.index).and_then(Option::take);
            orders = match errand {
                Some(errand) => {
                    drop(orders);
                    errand(self);
                    lock(&shared.orders)
                }
                None => {
                    let waited = shared.gate_changed.wait(orders);
                    waited.unwrap_or_else(PoisonError::into_inner)
                }
            };
        }
        let open = orders.gate == Gate::Run;
        if open {
            shared.running.send_modify(|running| *running += 1);
        }
        open
    }

    /// KVM_EXIT_INTERNAL_ERROR in words (Linux `Documentation/virt/kvm/api.rst`).
    fn internal_error(&mut self) -> String {
        // SAFETY: the exit reason says that `internal` is the member in use.
        let internal = unsafe { self.fd.get_kvm_run().__bindgen_anon_1.internal };
        let name = match internal.suberror {
            1 => "emulation failed",
            2 => "simultaneous exceptions",
            3 => "exception while delivering an event",
            4 => "unexpected exit reason",
            _ => "unknown",
        };
        format!("KVM internal error {} ({name})", internal.suberror)
    }

    /// The registers a person looks at first, on one line.
    fn registers(&self) -> String {
        match (self.fd.get_regs(), self.fd.get_sregs()) {
            (Ok(regs), Ok(sregs)) => format!(
                "vcpu {} rip={:#x} rsp={:#x} rflags={:#x} cr0={:#x} cr2={:#x} cr3={:#x} cr4={:#x} \
                 efer={:#x} cs={:#x}",
                self.index,
                regs.rip,
                regs.rsp,
                regs.rflags,
                sregs.cr0,
                sregs.cr2,
                sregs.cr3,
                sregs.cr4,
                sregs.efer,
                sregs.cs.selector
            ),
            _ => format!("vcpu {}, its registers cannot be read", self.index),
        }
    }
}

/// Orders are plain values: they are whole even if a holder panicked.
fn lock(orders: &Mutex<Orders>) -> MutexGuard<'_, Orders> {
    orders.lock().unwrap_or_else(PoisonError::into_inner)
}

thread_local! {
    /// The page of the vCPU that this thread runs, for the kick handler; null outside of `live`.
    static KVM_RUN: Cell<*mut kvm_run> = const { Cell::new(ptr::null_mut()) };
}

fn kick_signal() -> libc::c_int {
    libc::SIGRTMIN()
}

fn install_kick_handler() -> io::Result<()> {
    extern "C" fn on_kick(_: libc::c_int) {
        let run = KVM_RUN.get();
        if !run.is_null() {
            // SAFETY: the pointer is this thread's own, set while its vCPU is alive; a thread-local
            // without destructor and a byte store are safe in a signal handler.
            unsafe { (&raw mut (*run).immediate_exit).write_volatile(1) };
        }
    }
    // SAFETY: an all-zero sigaction is valid; the handler has the type that the flags announce (none).
    let result = unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = on_kick as extern "C" fn(libc::c_int) as libc::sighandler_t;
        libc::sigaction(kick_signal(), &action, ptr::null_mut())
    };
    match result {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
