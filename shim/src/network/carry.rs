//! What is made of a pod's network namespace, by a thread that is in it: a tap beside each interface, and what the guest is to be told.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use husk_netlink::{LinkChange, News, Refusal, Socket, link, news};
use husk_proto::agent as api;

use super::{
    NetworkError, redirect,
    survey::{self, Found},
    tap::{self, Tap},
};

/// What it takes to plug the network in, to follow it and to undo it.
#[derive(Debug)]
pub(super) struct Made {
    path: PathBuf,
    socket: Socket,
    /// Until somebody listens.
    pub(super) news: Option<News>,
    pub(super) carried: Vec<Carried>,
    pub(super) routes: Vec<api::Route>,
    pub(super) neighbours: Vec<api::Neighbour>,
    /// Slots of interfaces that are in the namespace no more.
    pub(super) gone: Vec<u32>,
}

/// An interface and its tap.
#[derive(Debug)]
pub(super) struct Carried {
    /// In the namespace.
    pub(super) index: u32,
    /// The tap's, there.
    pub(super) tap_index: u32,
    /// Until the VMM has it.
    pub(super) tap: Option<Tap>,
    /// As the agent is told; the slot is the VMM's to say.
    pub(super) interface: api::Interface,
}

impl Made {
    /// In this thread's namespace. What fails is taken back.
    pub(super) fn make(path: &Path, queues: u32) -> Result<Self, NetworkError> {
        let failed = |cause| NetworkError::Namespace {
            path: path.to_owned(),
            cause: Arc::new(cause),
        };
        let groups = [&[news::LINKS][..], &news::ADDRESSES, &news::ROUTES].concat();
        let mut made = Self {
            path: path.to_owned(),
            socket: Socket::open().map_err(failed)?,
            // Before anything is read, so that nothing is missed.
            news: Some(News::of(&groups).map_err(failed)?),
            carried: Vec::new(),
            routes: Vec::new(),
            neighbours: Vec::new(),
            gone: Vec::new(),
        };
        match made.look(queues) {
            Ok(_) => Ok(made),
            Err(error) => {
                made.unmake();
                Err(error)
            }
        }
    }

    /// Takes in what there is by now, in this thread's namespace. Whether there is anything to plug in or to be set.
    pub(super) fn look(&mut self, queues: u32) -> Result<bool, NetworkError> {
        let survey = survey::take(&mut self.socket, &self.path)?;
        let before = self.request();
        for found in survey.found {
            let known = self.carried.iter_mut();
            match known.into_iter().find(|known| known.index == found.index) {
                Some(known) => {
                    let slot = known.interface.slot;
                    if known.interface.mtu != found.interface.mtu {
                        let mtu = [LinkChange::Mtu(found.interface.mtu)];
                        let changed = link::change(&mut self.socket, known.tap_index, &mtu);
                        changed.map_err(|e| failed(&self.path, &found, "its tap's mtu", e))?;
                    }
                    known.interface = found.interface;
                    known.interface.slot = slot;
                }
                None => {
                    let carried = self.carry(found, queues)?;
                    self.carried.push(carried);
                }
            }
        }
        self.carried.retain(|carried| {
            let is_there = survey.there.contains(&carried.index);
            if !is_there && carried.interface.slot != 0 {
                self.gone.push(carried.interface.slot);
            }
            is_there
        });
        self.routes = survey.routes;
        self.neighbours = survey.neighbours;
        Ok(before != self.request())
    }

    fn carry(&mut self, found: Found, queues: u32) -> Result<Carried, NetworkError> {
        let (index, socket) = (found.index, &mut self.socket);
        let failed = |what, cause| failed(&self.path, &found, what, cause);
        redirect::clear(socket, index).map_err(|cause| failed("see whether it is free", cause))?;
        let tap = Tap::make(socket, &tap::name(index), &found.interface, queues);
        let tap = tap.map_err(|cause| failed("make its tap", cause))?;
        if let Err(cause) = redirect::join(socket, index, tap.index) {
            // The cause says more than what comes of it.
            let _ = redirect::part(socket, index);
            return Err(failed("redirect its packets", cause));
        }
        Ok(Carried {
            index,
            tap_index: tap.index,
            tap: Some(tap),
            interface: found.interface,
        })
    }

    /// What the agent is told.
    pub(super) fn request(&self) -> api::SetNetworkRequest {
        api::SetNetworkRequest {
            interfaces: self.carried.iter().map(|c| c.interface.clone()).collect(),
            routes: self.routes.clone(),
            neighbours: self.neighbours.clone(),
            ..api::SetNetworkRequest::default()
        }
    }

    /// Takes an interface out of it that could not be plugged in.
    pub(super) fn forget(&mut self, index: u32) {
        self.carried.retain(|carried| carried.index != index);
        self.part(index);
    }

    /// Leaves nothing in the namespace.
    pub(super) fn unmake(mut self) {
        for carried in std::mem::take(&mut self.carried) {
            self.part(carried.index);
        }
    }

    fn part(&mut self, index: u32) {
        if let Err(e) = redirect::part(&mut self.socket, index) {
            let path = self.path.display();
            log::warn!("network namespace {path}: what redirects interface {index}: {e}");
        }
    }
}

fn failed(path: &Path, found: &Found, what: &'static str, cause: Refusal) -> NetworkError {
    NetworkError::Interface {
        path: path.to_owned(),
        interface: found.interface.name.clone(),
        what,
        cause: Arc::new(cause),
    }
}
