//! Id-mapped bind mounts (`idmap`, `ridmap`, a mount's `uidMappings` and `gidMappings`): the host's kernel shows
//! the guest other owners than the files have.
//!
//! It is the host's mount that is mapped, and not the guest's: the file server needs no word of it, and what the
//! guest writes comes back as the owner that the map says. The VMM's own user namespace maps every id to itself,
//! so the two do not meet. The layers of a snapshot that containerd wants mapped are done the same way.

use std::{
    fs::{self, File},
    io,
    os::fd::OwnedFd,
    path::Path,
};

use serde::Deserialize;
use serde_json::Value;

use crate::{
    mount,
    spec::{SpecError, refuse},
};

/// One range, in the words of the specification.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
pub struct Range {
    /// Of the files, on the file system.
    #[serde(rename = "containerID")]
    pub container_id: u32,
    /// What the mount shows.
    #[serde(rename = "hostID")]
    pub host_id: u32,
    pub size: u32,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IdMaps {
    pub uid: Vec<Range>,
    pub gid: Vec<Range>,
    /// The mounts below, too.
    pub recursive: bool,
}

fn ranges(of: &Value, name: &str) -> Result<Vec<Range>, serde_json::Error> {
    match of.get(name) {
        None | Some(Value::Null) => Ok(Vec::new()),
        Some(list) => Vec::deserialize(list),
    }
}

/// The map of the container's user namespace, for mounts that have none of their own. What is malformed is the
/// agent's to name.
pub fn of_container(spec: &Value) -> Option<IdMaps> {
    let linux = spec.get("linux")?;
    let uid = ranges(linux, "uidMappings").ok()?;
    let gid = ranges(linux, "gidMappings").ok()?;
    (!uid.is_empty() && !gid.is_empty()).then_some(IdMaps {
        uid,
        gid,
        recursive: false,
    })
}

/// Takes what a bind mount says of its ids out of the specification: the host does it.
pub fn take(
    mount: &mut Value,
    field: &str,
    container: Option<&IdMaps>,
) -> Result<Option<IdMaps>, SpecError> {
    let own = |name: &str| {
        ranges(mount, name).map_err(|cause| refuse(format!("{field}.{name}"), cause.to_string()))
    };
    let (uid, gid) = (own("uidMappings")?, own("gidMappings")?);
    let Some(mount) = mount.as_object_mut() else {
        return Ok(None);
    };
    mount.remove("uidMappings");
    mount.remove("gidMappings");
    let mut asked = None;
    if let Some(options) = mount.get_mut("options").and_then(Value::as_array_mut) {
        options.retain(|option| match option.as_str() {
            Some("idmap") => {
                asked = Some(false);
                false
            }
            Some("ridmap") => {
                asked = Some(true);
                false
            }
            _ => true,
        });
    }
    match (uid.is_empty(), gid.is_empty()) {
        (false, false) => Ok(Some(IdMaps {
            uid,
            gid,
            recursive: asked.unwrap_or(false),
        })),
        (true, true) => match (asked, container) {
            (None, _) => Ok(None),
            (Some(recursive), Some(container)) => Ok(Some(IdMaps {
                recursive,
                ..container.clone()
            })),
            (Some(_), None) => Err(refuse(
                format!("{field}.options"),
                "idmap or ridmap without a map, which neither the mount nor the container has",
            )),
        },
        _ => Err(refuse(
            field,
            "uidMappings and gidMappings are there together or not at all",
        )),
    }
}

/// Takes `uidmap=` and `gidmap=` out of the options of a snapshot's mount: containerd's words for a snapshot
/// that was made with `--remap-labels`. Each is `container:host:size`, several of them with commas between.
pub fn of_snapshot(options: &mut Vec<String>) -> Result<Option<IdMaps>, String> {
    let mut taken = |name: &str| {
        let mut found = Vec::new();
        let mut wrong = None;
        options.retain(|option| match option.strip_prefix(name) {
            Some(text) => {
                for range in text.split(',') {
                    match Range::parse(range) {
                        Some(range) => found.push(range),
                        None => wrong = Some(format!("option {option}: no map of ids")),
                    }
                }
                false
            }
            None => true,
        });
        wrong.map_or(Ok(found), Err)
    };
    let (uid, gid) = (taken("uidmap=")?, taken("gidmap=")?);
    match (uid.is_empty(), gid.is_empty()) {
        (true, true) => Ok(None),
        (false, false) => Ok(Some(IdMaps {
            uid,
            gid,
            recursive: false,
        })),
        _ => Err("options uidmap and gidmap are there together or not at all".into()),
    }
}

impl Range {
    fn parse(text: &str) -> Option<Self> {
        let mut numbers = text.split(':').map(|number| number.parse().ok());
        let range = Self {
            container_id: numbers.next()??,
            host_id: numbers.next()??,
            size: numbers.next()??,
        };
        numbers.next().is_none().then_some(range)
    }
}

/// Mounts the lower layers of an overlay with other owners, and puts them in the place of those of its options:
/// an overlay itself cannot be mapped. They are mounted over `place`, where the overlay will cover them, in a mount
/// namespace that is this thread's alone.
pub fn map_layers(options: &mut [String], place: &Path, maps: &IdMaps) -> io::Result<()> {
    let namespace = user_namespace(maps)?;
    mount::mount("tmpfs", place, "tmpfs", 0, "mode=755,size=64k")?;
    for option in options {
        let Some(layers) = option.strip_prefix("lowerdir=") else {
            continue;
        };
        let mut mapped = Vec::new();
        for (index, layer) in layers.split(':').enumerate() {
            let at = place.join(index.to_string());
            fs::create_dir(&at)?;
            let tree = mount::open_tree(Path::new(layer), false)?;
            mount::map_ids(&tree, false, &namespace)?;
            mount::attach(&tree, &at)?;
            mapped.push(at.to_string_lossy().into_owned());
        }
        *option = format!("lowerdir={}", mapped.join(":"));
    }
    Ok(())
}

/// A user namespace with these maps that nobody is in.
pub fn user_namespace(maps: &IdMaps) -> io::Result<OwnedFd> {
    let child = Child::born_into_user_namespace()?;
    let process = format!("/proc/{}", child.0);
    for (name, ranges) in [("uid_map", &maps.uid), ("gid_map", &maps.gid)] {
        let line =
            |range: &Range| format!("{} {} {}\n", range.container_id, range.host_id, range.size);
        let lines: String = ranges.iter().map(line).collect();
        fs::write(format!("{process}/{name}"), &lines)
            .map_err(|cause| io::Error::new(cause.kind(), format!("{name} {lines:?}: {cause}")))?;
    }
    Ok(File::open(format!("{process}/ns/user"))?.into())
}

/// A process that does nothing, and ends with this value.
struct Child(libc::pid_t);

impl Child {
    fn born_into_user_namespace() -> io::Result<Self> {
        let flags = libc::c_long::from(libc::CLONE_NEWUSER | libc::SIGCHLD);
        // SAFETY: without CLONE_VM this is fork(2); the child has its own copy of the memory, and only makes system
        // calls, as another thread may have held any lock.
        let pid = unsafe { libc::syscall(libc::SYS_clone, flags, 0, 0, 0, 0) };
        match pid {
            -1 => Err(io::Error::last_os_error()),
            // SAFETY: numbers only. It ends at the latest with the thread that made it.
            0 => unsafe {
                libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
                loop {
                    libc::pause();
                }
            },
            pid => Ok(Self(libc::pid_t::try_from(pid).map_err(io::Error::other)?)),
        }
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        // SAFETY: a child of ours that nobody else waits for, so the pid is still its own; no status is asked for.
        unsafe {
            libc::kill(self.0, libc::SIGKILL);
            libc::waitpid(self.0, std::ptr::null_mut(), 0);
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn maps() -> Value {
        json!([{"containerID": 0, "hostID": 1000, "size": 10}])
    }

    #[test]
    fn maps_are_the_mounts_or_the_containers() {
        let container = json!({"linux": {"uidMappings": maps(), "gidMappings": maps()}});
        let container = of_container(&container);
        let mut mount = json!({"options": ["rbind", "ridmap"], "uidMappings": maps(),
            "gidMappings": [{"containerID": 0, "hostID": 5, "size": 1}]});
        let taken = take(&mut mount, "mounts[0]", container.as_ref())
            .unwrap()
            .unwrap();
        assert_eq!((taken.gid[0].host_id, taken.recursive), (5, true));
        assert_eq!(mount, json!({"options": ["rbind"]}));
        let mut mount = json!({"options": ["idmap"]});
        let taken = take(&mut mount, "mounts[0]", container.as_ref()).unwrap();
        assert_eq!(taken, container);
        let mut mount = json!({"options": ["rbind"]});
        assert_eq!(
            take(&mut mount, "mounts[0]", container.as_ref()).unwrap(),
            None
        );
    }

    #[test]
    fn snapshots_have_maps_among_their_options() {
        let options = |list: &[&str]| {
            list.iter()
                .map(|text| (*text).to_owned())
                .collect::<Vec<_>>()
        };
        let mut mapped = options(&["lowerdir=/a", "uidmap=0:5:10,10:1:1", "gidmap=0:6:10"]);
        let maps = of_snapshot(&mut mapped).unwrap().unwrap();
        assert_eq!(
            (
                maps.uid.len(),
                maps.uid[1].container_id,
                maps.gid[0].host_id
            ),
            (2, 10, 6)
        );
        assert_eq!(mapped, ["lowerdir=/a"]);
        assert_eq!(of_snapshot(&mut options(&["ro"])).unwrap(), None);
        for wrong in ["uidmap=0:5", "uidmap=0:5:10", "uidmap=0:5:10:1"] {
            assert!(of_snapshot(&mut options(&[wrong])).is_err(), "{wrong}");
        }
    }

    #[test]
    fn maps_that_are_missing_or_broken_are_named() {
        for (mut mount, start) in [
            (json!({"options": ["idmap"]}), "mounts[3].options: idmap"),
            (json!({"uidMappings": maps()}), "mounts[3]: uidMappings and"),
            (
                json!({"uidMappings": [{"size": 1}]}),
                "mounts[3].uidMappings: missing field",
            ),
        ] {
            let error = take(&mut mount, "mounts[3]", None).unwrap_err().to_string();
            assert!(error.starts_with(start), "{error}");
        }
    }
}
