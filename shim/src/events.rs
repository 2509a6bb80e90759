//! What containerd is told, in the order in which it happened, also if it is away for a while.
//!
//! Publishing only queues. One task forwards the head of the queue until containerd has it, and
//! dials again when the connection is lost. The queue is bounded; exits are never dropped.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, SystemTime},
};

use containerd_shim_protos::{
    api::ForwardRequest,
    events::task::{
        TaskCreate, TaskDelete, TaskExecAdded, TaskExecStarted, TaskExit, TaskOOM, TaskPaused,
        TaskResumed, TaskStart,
    },
    shim::event::Envelope,
    shim_async::EventsClient,
};
use protobuf::{
    Message, MessageField,
    well_known_types::{any::Any, timestamp::Timestamp},
};
use tokio::{
    net::UnixStream,
    sync::Notify,
    time::{sleep, timeout},
};
use ttrpc::{
    r#async::{Client, transport::Socket},
    context,
};

/// Events that wait before those that are not exits get dropped.
const QUEUE: usize = 2048;
/// For containerd to take one event.
const ANSWER: Duration = Duration::from_secs(5);
/// Between two attempts to reach containerd.
const PAUSE: Duration = Duration::from_millis(200);

/// Something that happened to a task.
#[derive(Clone, Debug)]
pub enum TaskEvent {
    Create(TaskCreate),
    Start(TaskStart),
    Exit(TaskExit),
    Delete(TaskDelete),
    Oom(TaskOOM),
    ExecAdded(TaskExecAdded),
    ExecStarted(TaskExecStarted),
    Paused(TaskPaused),
    Resumed(TaskResumed),
}

impl TaskEvent {
    /// The id of the container that it is about.
    pub fn container(&self) -> &str {
        match self {
            Self::Create(e) => &e.container_id,
            Self::Start(e) => &e.container_id,
            Self::Exit(e) => &e.container_id,
            Self::Delete(e) => &e.container_id,
            Self::Oom(e) => &e.container_id,
            Self::ExecAdded(e) => &e.container_id,
            Self::ExecStarted(e) => &e.container_id,
            Self::Paused(e) => &e.container_id,
            Self::Resumed(e) => &e.container_id,
        }
    }

    /// Topic, type and bytes. The type is spelled out here as protobuf's own reflection would cost
    /// each pod its tables.
    fn encode(&self) -> (&'static str, &'static str, protobuf::Result<Vec<u8>>) {
        match self {
            Self::Create(e) => ("/tasks/create", "TaskCreate", e.write_to_bytes()),
            Self::Start(e) => ("/tasks/start", "TaskStart", e.write_to_bytes()),
            Self::Exit(e) => ("/tasks/exit", "TaskExit", e.write_to_bytes()),
            Self::Delete(e) => ("/tasks/delete", "TaskDelete", e.write_to_bytes()),
            Self::Oom(e) => ("/tasks/oom", "TaskOOM", e.write_to_bytes()),
            Self::ExecAdded(e) => ("/tasks/exec-added", "TaskExecAdded", e.write_to_bytes()),
            Self::ExecStarted(e) => ("/tasks/exec-started", "TaskExecStarted", e.write_to_bytes()),
            Self::Paused(e) => ("/tasks/paused", "TaskPaused", e.write_to_bytes()),
            Self::Resumed(e) => ("/tasks/resumed", "TaskResumed", e.write_to_bytes()),
        }
    }
}

/// A protobuf timestamp.
pub fn timestamp(time: SystemTime) -> MessageField<Timestamp> {
    MessageField::some(time.into())
}

/// Where events go.
#[derive(Clone)]
pub struct Publisher {
    namespace: String,
    queue: Arc<Queue>,
}

struct Queue {
    events: Mutex<VecDeque<Envelope>>,
    /// An event came, or went.
    changed: Notify,
}

impl Publisher {
    /// Forwards to containerd's ttrpc socket from a task of its own.
    pub fn start(namespace: &str, socket: String) -> Self {
        let queue = Arc::new(Queue {
            events: Mutex::new(VecDeque::new()),
            changed: Notify::new(),
        });
        tokio::spawn(forward_all(queue.clone(), socket));
        Self {
            namespace: namespace.to_owned(),
            queue,
        }
    }

    /// Queues one event. It never waits.
    pub fn publish(&self, event: TaskEvent) {
        let (topic, kind, bytes) = event.encode();
        let value = match bytes {
            Ok(value) => value,
            Err(e) => return log::error!("encode an event for {topic}: {e}"),
        };
        let envelope = Envelope {
            timestamp: timestamp(SystemTime::now()),
            namespace: self.namespace.clone(),
            topic: topic.to_owned(),
            event: MessageField::some(Any {
                type_url: format!("containerd.events.{kind}"),
                value,
                ..Any::default()
            }),
            ..Envelope::default()
        };
        let mut events = self.queue.lock();
        if events.len() >= QUEUE && !matches!(event, TaskEvent::Exit(_)) {
            return log::warn!("containerd takes no events: one for {topic} is dropped");
        }
        events.push_back(envelope);
        drop(events);
        self.queue.changed.notify_waiters();
    }

    /// Returns when containerd has everything, or after `limit`.
    pub async fn flush(&self, limit: Duration) {
        let empty = async {
            loop {
                let changed = self.queue.changed.notified();
                if self.queue.lock().is_empty() {
                    return;
                }
                changed.await;
            }
        };
        if timeout(limit, empty).await.is_err() {
            log::warn!(
                "{} events did not reach containerd",
                self.queue.lock().len()
            );
        }
    }
}

impl Queue {
    fn lock(&self) -> std::sync::MutexGuard<'_, VecDeque<Envelope>> {
        self.events.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The oldest event, which stays in the queue until it has arrived.
    async fn head(&self) -> Envelope {
        loop {
            let changed = self.changed.notified();
            if let Some(head) = self.lock().front() {
                return head.clone();
            }
            changed.await;
        }
    }
}

async fn forward_all(queue: Arc<Queue>, socket: String) {
    let mut client = None;
    loop {
        let request = ForwardRequest {
            envelope: MessageField::some(queue.head().await),
            ..ForwardRequest::default()
        };
        let connected = match &client {
            Some(client) => client,
            None => match connect(&socket).await {
                Ok(new) => client.insert(new),
                Err(e) => {
                    log::debug!("connect to {socket}: {e}");
                    sleep(PAUSE).await;
                    continue;
                }
            },
        };
        match connected
            .forward(context::with_duration(ANSWER), &request)
            .await
        {
            Ok(_) => {}
            // containerd has seen it and will not like it better the next time.
            Err(ttrpc::Error::RpcStatus(status)) => {
                log::warn!("containerd refuses an event: {}", status.message());
            }
            Err(e) => {
                log::debug!("send an event to {socket}: {e}");
                client = None;
                sleep(PAUSE).await;
                continue;
            }
        }
        queue.lock().pop_front();
        queue.changed.notify_waiters();
    }
}

async fn connect(socket: &str) -> std::io::Result<EventsClient> {
    let path = socket.strip_prefix("unix://").unwrap_or(socket);
    let stream = timeout(ANSWER, UnixStream::connect(path)).await??;
    Ok(EventsClient::new(Client::new(Socket::from(stream))))
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use async_trait::async_trait;
    use containerd_shim_protos::shim_async::{Events, create_events};
    use protobuf::well_known_types::empty::Empty;
    use ttrpc::r#async::{Server, TtrpcContext};

    use super::*;

    type Seen = Arc<Mutex<Vec<(String, String)>>>;

    struct Containerd(Seen);

    #[async_trait]
    impl Events for Containerd {
        async fn forward(&self, _: &TtrpcContext, request: ForwardRequest) -> ttrpc::Result<Empty> {
            let envelope = request.envelope.unwrap();
            assert_eq!(envelope.namespace, "default");
            assert!(envelope.timestamp.seconds > 0);
            let event = envelope.event.unwrap();
            assert!(event.type_url.starts_with("containerd.events.Task"));
            let id = TaskStart::parse_from_bytes(&event.value)
                .unwrap()
                .container_id;
            self.0.lock().unwrap().push((envelope.topic, id));
            Ok(Empty::new())
        }
    }

    async fn serve(socket: &Path, seen: &Seen) -> Server {
        let _ = std::fs::remove_file(socket);
        let mut server = Server::new()
            .bind(&format!("unix://{}", socket.display()))
            .unwrap()
            .register_service(create_events(Arc::new(Containerd(seen.clone()))));
        server.start().await.unwrap();
        server
    }

    fn start(id: &str) -> TaskEvent {
        TaskEvent::Start(TaskStart {
            container_id: id.into(),
            ..TaskStart::default()
        })
    }

    fn exit(id: &str) -> TaskEvent {
        TaskEvent::Exit(TaskExit {
            container_id: id.into(),
            ..TaskExit::default()
        })
    }

    #[tokio::test]
    async fn order_survives_a_restart_of_containerd() {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("containerd.sock.ttrpc");
        let seen = Seen::default();
        let publisher = Publisher::start("default", socket.display().to_string());

        publisher.publish(start("0"));
        sleep(Duration::from_millis(20)).await;
        let mut first = serve(&socket, &seen).await;
        publisher.publish(exit("1"));
        publisher.flush(Duration::from_secs(5)).await;
        assert_eq!(seen.lock().unwrap().len(), 2);

        first.shutdown().await.unwrap();
        std::fs::remove_file(&socket).unwrap();
        publisher.publish(exit("2"));
        sleep(Duration::from_millis(50)).await;
        publisher.publish(start("3"));
        let _second = serve(&socket, &seen).await;
        publisher.flush(Duration::from_secs(5)).await;
        let ids: Vec<_> = seen
            .lock()
            .unwrap()
            .iter()
            .map(|(_, id)| id.clone())
            .collect();
        assert_eq!(ids, ["0", "1", "2", "3"]);
        assert_eq!(seen.lock().unwrap()[2].0, "/tasks/exit");
    }

    #[tokio::test]
    async fn a_full_queue_keeps_every_exit() {
        let publisher = Publisher::start("default", "/nowhere".into());
        for _ in 0..QUEUE + 10 {
            publisher.publish(start("s"));
        }
        publisher.publish(exit("e"));
        assert_eq!(publisher.queue.lock().len(), QUEUE + 1);
        publisher.flush(Duration::from_millis(10)).await;
    }
}
