//! What a specification means for a container before there is one: whose ids it has, what has to be said of its
//! namespaces from outside, and who may make cgroups in it. Pure, but for the containers it looks at; owned by
//! `container`.

use crate::container::Joined;
use crate::control::ContainerPlan;
use crate::spec::namespaces::{self, Maps};
use crate::spec::{NamespaceKind, Problem, Spec};

/// The maps of the user namespace that the container gets: its own, or those of the one that it joins.
pub fn user_maps(spec: &Spec, joined: &[Joined]) -> Result<Option<Maps>, Problem> {
    let own = Maps {
        uid: spec.linux.uid_mappings.clone(),
        gid: spec.linux.gid_mappings.clone(),
    };
    if spec.makes(NamespaceKind::User) {
        return Ok(Some(own));
    }
    let flag = NamespaceKind::User.flag();
    let Some(other) = joined.iter().find(|other| other.flags & flag != 0) else {
        return Ok(None);
    };
    let theirs = other.container.maps().cloned().ok_or_else(|| {
        let what = format!("container {:?} has none", other.container.id());
        Problem::new("linux.namespaces: user", what)
    })?;
    if own != Maps::default() && own != theirs {
        let what = "are not those of the namespace that is joined";
        return Err(Problem::new("linux.uidMappings and gidMappings", what));
    }
    Ok(Some(theirs))
}

/// What only the agent can say of the namespaces that oci-init makes: by name of the file in /proc.
pub fn files_of_new_namespaces(plan: &ContainerPlan) -> Vec<(&'static str, String)> {
    let mut files = Vec::new();
    if let (true, Some(maps)) = (plan.spec.makes(NamespaceKind::User), &plan.maps) {
        files.push(("uid_map", namespaces::lines(&maps.uid)));
        files.push(("gid_map", namespaces::lines(&maps.gid)));
    }
    if plan.spec.makes(NamespaceKind::Time) {
        let offsets = namespaces::offsets(&plan.spec.linux.time_offsets);
        files.push(("timens_offsets", offsets));
    }
    files
}

/// Who may make cgroups in the container: as with runc, its user, if it sees its cgroups alone and can write.
pub fn cgroup_owner(spec: &Spec, maps: Option<&Maps>) -> Option<u32> {
    let writable = spec.mounts.iter().any(|mount| {
        mount.source == "cgroup"
            && mount.destination.trim_end_matches('/') == "/sys/fs/cgroup"
            && !mount.options.iter().any(|option| option == "ro")
    });
    if !writable || !spec.makes(NamespaceKind::Cgroup) {
        return None;
    }
    let uid = spec.process.user.uid;
    match maps {
        Some(maps) => namespaces::outside(&maps.uid, uid),
        None => Some(uid),
    }
}
