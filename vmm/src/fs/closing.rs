//! Closing what a guest has left open, where whoever must be rid of it may not wait.
//!
//! The last close of a file can take as long as the host's server behind it. However often a guest
//! starts anew meanwhile, no more than one thread closes, and it ends when nothing is left. What lies
//! there to be closed keeps its permits ([`super::limits`]), so it cannot pile up either.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;

use crate::jail::{self, Role};

/// Things to be dropped, and the thread that does it while there are any.
pub(super) struct Closer<T>(Arc<Mutex<Pile<T>>>);

struct Pile<T> {
    gone: Vec<T>,
    /// A thread is at work, and looks at the pile again before it ends.
    at_work: bool,
}

impl<T: Send + 'static> Closer<T> {
    pub(super) fn new() -> Closer<T> {
        Closer(Arc::new(Mutex::new(Pile {
            gone: Vec::new(),
            at_work: false,
        })))
    }

    /// Drops `gone`, elsewhere and soon; where there can be no thread, right here.
    pub(super) fn close(&self, gone: T) {
        let mut pile = lock(&self.0);
        pile.gone.push(gone);
        if pile.at_work {
            return;
        }
        pile.at_work = true;
        drop(pile);
        let shared = Arc::clone(&self.0);
        let thread = thread::Builder::new().name("fs-close".to_owned());
        let started = jail::spawn(thread, Role::Files, move || work(&shared));
        if started.is_err() {
            work(&self.0);
        }
    }
}

fn work<T>(shared: &Mutex<Pile<T>>) {
    loop {
        let mut pile = lock(shared);
        let gone = std::mem::take(&mut pile.gone);
        if gone.is_empty() {
            pile.at_work = false;
            return;
        }
        drop(pile);
        drop(gone);
    }
}

/// A pile is whole even if a holder panicked.
fn lock<T>(pile: &Mutex<Pile<T>>) -> MutexGuard<'_, Pile<T>> {
    pile.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{self, Receiver, Sender};
    use std::thread::ThreadId;

    use super::*;

    /// Says who drops it, and takes as long for it as the test wants.
    struct Slow(Sender<ThreadId>, Arc<Mutex<Receiver<()>>>);

    impl Drop for Slow {
        fn drop(&mut self) {
            let _ = self.0.send(thread::current().id());
            let _ = self.1.lock().unwrap().recv();
        }
    }

    #[test]
    fn one_thread_closes_however_much_there_is_to_be_closed() {
        let closer = Closer::new();
        let (said, who) = mpsc::channel();
        let (go, wait) = mpsc::channel();
        let wait = Arc::new(Mutex::new(wait));
        let close = || closer.close(Slow(said.clone(), Arc::clone(&wait)));
        close();
        let first = who.recv().unwrap();
        assert_ne!(first, thread::current().id());
        // None of these is waited for, although the first is not done.
        for _ in 0..100 {
            close();
        }
        assert!(who.try_recv().is_err(), "a second one closes beside it");
        for _ in 0..=100 {
            go.send(()).unwrap();
        }
        for _ in 0..100 {
            assert_eq!(who.recv().unwrap(), first);
        }
        // It ends, and the next to come finds another.
        while lock(&closer.0).at_work {
            thread::yield_now();
        }
        close();
        assert_ne!(who.recv().unwrap(), first);
        go.send(()).unwrap();
    }
}
