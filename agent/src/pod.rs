//! The pod: all containers of this guest, and what the guest itself is asked for.
//!
//! The one owner of the containers, on one thread; `service` speaks to it through [`Door`]. It hands
//! a request to its container and never waits for one container before it serves another.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::future::Future;
use std::io;
use std::rc::Rc;
use std::sync::Arc;

use husk_proto::agent::{DialRequest, SetNetworkRequest, Stdio};
use tokio::sync::{Mutex, mpsc, oneshot};
use tokio::task::spawn_local;

use crate::container::{Container, Ground, Joined};
use crate::fault::Fault;
use crate::forward::Connections;
use crate::grow::{self, Size};
use crate::network::Network;
use crate::rehearsal;
use crate::spec::{self, Spec};

pub struct Pod {
    ground: Rc<Ground>,
    /// Done before the first container; the result is remembered when it is good.
    prepare: fn() -> io::Result<()>,
    prepared: Cell<bool>,
    containers: RefCell<HashMap<String, Slot>>,
    /// One request at a time has it.
    network: Arc<Mutex<Network>>,
    connections: Connections,
}

enum Slot {
    /// The id is taken, the container is being made.
    Creating,
    Live(Rc<Container>),
}

/// How requests reach the pod from the ttrpc side, whose futures may be dropped half way and may be
/// on any thread: the work itself is the pod's own task and always runs to its end.
#[derive(Clone)]
pub struct Door(mpsc::UnboundedSender<Work>);

type Work = Box<dyn FnOnce(Rc<Pod>) + Send>;

impl Door {
    /// Asks the pod; `work` runs on its thread.
    pub async fn ask<T, F, Fut>(&self, work: F) -> Result<T, Fault>
    where
        T: Send + 'static,
        F: FnOnce(Rc<Pod>) -> Fut + Send + 'static,
        Fut: Future<Output = Result<T, Fault>> + 'static,
    {
        let (answer, answered) = oneshot::channel();
        let work: Work = Box::new(move |pod| {
            spawn_local(async move {
                answer.send(work(pod).await).ok();
            });
        });
        let gone = || Fault::Broken("the pod is gone".into());
        self.0.send(work).map_err(|_| gone())?;
        answered.await.map_err(|_| gone())?
    }
}

impl Pod {
    /// A pod and the door to it. `prepare` is called before the first container.
    pub fn open(ground: Ground, prepare: fn() -> io::Result<()>) -> Door {
        let pod = Rc::new(Self {
            ground: Rc::new(ground),
            prepare,
            prepared: Cell::new(false),
            containers: RefCell::default(),
            network: Arc::default(),
            connections: Connections::default(),
        });
        let (door, mut requests) = mpsc::unbounded_channel::<Work>();
        spawn_local(async move {
            while let Some(work) = requests.recv().await {
                work(Rc::clone(&pod));
            }
        });
        Door(door)
    }

    pub fn container(&self, id: &str) -> Result<Rc<Container>, Fault> {
        match self.containers.borrow().get(id) {
            Some(Slot::Live(container)) => Ok(Rc::clone(container)),
            Some(Slot::Creating) => Err(Fault::State(format!("container {id:?} is being created"))),
            None => Err(Fault::NotFound(format!("container {id:?}"))),
        }
    }

    /// Creates a container from config.json; the pid of its init.
    pub async fn create(&self, id: &str, json: &[u8], stdio: &Stdio) -> Result<u32, Fault> {
        let plain = |c: char| c.is_ascii_alphanumeric() || "_.-".contains(c);
        if id.is_empty() || id.len() > 128 || id.starts_with('.') || !id.chars().all(plain) {
            return Err(Fault::Invalid(format!(
                "container_id: {id:?} is no identifier"
            )));
        }
        let spec: Spec = spec::parse(json)?;
        spec.validate()?;
        if self.containers.borrow().contains_key(id) {
            return Err(Fault::Exists(format!("container {id:?}")));
        }
        let joined = self.joined(&spec)?;
        self.be_prepared()?;
        self.containers
            .borrow_mut()
            .insert(id.into(), Slot::Creating);
        match Container::create(Rc::clone(&self.ground), id, spec, &joined, stdio).await {
            Ok(container) => {
                let pid = container.pid();
                self.containers
                    .borrow_mut()
                    .insert(id.into(), Slot::Live(container));
                Ok(pid)
            }
            Err(fault) => {
                self.containers.borrow_mut().remove(id);
                Err(fault)
            }
        }
    }

    /// The containers whose namespaces the one with this specification joins.
    fn joined(&self, spec: &Spec) -> Result<Vec<Joined>, Fault> {
        let joined = spec.joined()?;
        let joined = joined.into_iter().map(|(id, flags)| {
            let container = self.container(id)?;
            Ok(Joined { container, flags })
        });
        joined.collect()
    }

    fn be_prepared(&self) -> Result<(), Fault> {
        if !self.prepared.get() {
            (self.prepare)()
                .map_err(|error| Fault::Broken(format!("prepare for containers: {error}")))?;
            self.prepared.set(true);
        }
        Ok(())
    }

    /// Takes what the guest has beyond its template into use. Containers are made with what there is, so
    /// there must be none yet.
    pub async fn grow(&self, size: Size) -> Result<(), Fault> {
        if !self.containers.borrow().is_empty() {
            return Err(Fault::State("the guest has containers already".into()));
        }
        self.be_prepared()?;
        let growing = tokio::task::spawn_blocking(move || grow::grow(size));
        growing
            .await
            .map_err(|error| Fault::Broken(format!("grow: {error}")))?
    }

    /// Makes the pod's network what is said.
    pub async fn set_network(&self, request: SetNetworkRequest) -> Result<(), Fault> {
        self.be_prepared()?;
        let mut network = Arc::clone(&self.network).lock_owned().await;
        let setting = tokio::task::spawn_blocking(move || network.set(&request));
        setting
            .await
            .map_err(|error| Fault::Broken(format!("set the network: {error}")))?
    }

    /// Connects a stream to a server of the pod.
    pub async fn dial(&self, request: &DialRequest) -> Result<(), Fault> {
        self.connections.dial(&self.ground.arrivals, request).await
    }

    /// Does ahead what every container of every clone of this guest needs. Nobody hears of it. With
    /// `leave`, it ends as soon as its container has been started.
    pub async fn rehearse(&self, leave: bool) -> Result<(), Fault> {
        if !self.containers.borrow().is_empty() {
            return Err(Fault::State("the guest has containers already".into()));
        }
        self.be_prepared()?;
        if leave {
            return rehearsal::begin(self, &self.ground).await;
        }
        rehearsal::run(self, &self.ground).await?;
        self.ground.events.forget();
        Ok(())
    }

    pub async fn delete(&self, id: &str, exec_id: &str) -> Result<(), Fault> {
        let container = self.container(id)?;
        if !exec_id.is_empty() {
            return container.forget(exec_id).await;
        }
        container.delete().await?;
        self.containers.borrow_mut().remove(id);
        Ok(())
    }
}
