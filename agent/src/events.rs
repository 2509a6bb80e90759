//! Exits and OOM kills on their way to the shim.
//!
//! A queue that `process` and `container` fill and the one `Events` stream empties, in order. What a
//! broken stream has not taken stays for the next. Bounded: a guest that nobody listens to must not
//! grow. The lock is held for lines and never across an await.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};

use husk_proto::agent::{Event, OutOfMemory, ProcessExit};
use tokio::sync::Notify;

/// An event is about 200 bytes.
const LIMIT: usize = 4096;

#[derive(Default)]
pub struct Events {
    state: Mutex<State>,
    /// One permit: there is one listener that counts, the last.
    news: Notify,
}

#[derive(Default)]
struct State {
    queue: VecDeque<Event>,
    /// Number of the listener that may take events.
    listener: u64,
}

impl Events {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Status: exit code, or 128 + signal.
    pub fn exit(&self, container: &str, exec: &str, status: u32) {
        let mut event = Event::new();
        event.set_exit(ProcessExit {
            container_id: container.into(),
            exec_id: exec.into(),
            status,
            ..ProcessExit::default()
        });
        self.push(event);
    }

    pub fn out_of_memory(&self, container: &str) {
        let mut event = Event::new();
        event.set_oom(OutOfMemory {
            container_id: container.into(),
            ..OutOfMemory::default()
        });
        self.push(event);
    }

    fn push(&self, event: Event) {
        let mut state = self.state();
        if state.queue.len() >= LIMIT {
            state.queue.pop_front();
            log::error!("an event is lost: nobody has taken {LIMIT} before it");
        }
        state.queue.push_back(event);
        drop(state);
        self.news.notify_one();
    }

    /// Drops what nobody has taken.
    pub fn forget(&self) {
        self.state().queue.clear();
    }

    /// Becomes the listener; an earlier one gets nothing more.
    pub fn listen(&self) -> Listener<'_> {
        let mut state = self.state();
        state.listener = state.listener.wrapping_add(1);
        // Wakes the earlier one, so that it ends, or leaves a permit for the first look.
        self.news.notify_one();
        Listener {
            events: self,
            number: state.listener,
        }
    }
}

pub struct Listener<'a> {
    events: &'a Events,
    number: u64,
}

impl Listener<'_> {
    /// The oldest event, which stays in the queue until [`Listener::taken`]; `None` when another
    /// listens now.
    pub async fn next(&self) -> Option<Event> {
        loop {
            {
                let state = self.events.state();
                if state.listener != self.number {
                    // The wake-up may have been meant for the other one.
                    self.events.news.notify_one();
                    return None;
                }
                if let Some(event) = state.queue.front() {
                    return Some(event.clone());
                }
            }
            self.events.news.notified().await;
        }
    }

    /// The last event given out has been sent.
    pub fn taken(&self) {
        let mut state = self.events.state();
        if state.listener == self.number {
            state.queue.pop_front();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn exec(event: &Event) -> String {
        event.exit().exec_id.clone()
    }

    #[tokio::test]
    async fn events_keep_their_order_across_a_broken_stream() {
        let events = Events::default();
        events.exit("c", "1", 0);
        events.exit("c", "2", 137);
        let broken = events.listen();
        assert_eq!(exec(&broken.next().await.unwrap()), "1");
        broken.taken();
        assert_eq!(exec(&broken.next().await.unwrap()), "2");
        // Not taken: the next listener gets it.
        let next = events.listen();
        assert!(broken.next().await.is_none());
        let event = next.next().await.unwrap();
        assert_eq!((exec(&event).as_str(), event.exit().status), ("2", 137));
    }

    #[tokio::test]
    async fn the_queue_is_bounded_and_loses_the_oldest() {
        let events = Events::default();
        for i in 0..=LIMIT {
            events.exit("c", &i.to_string(), 0);
        }
        assert_eq!(exec(&events.listen().next().await.unwrap()), "1");
    }
}
