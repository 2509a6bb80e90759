//! Paths inside the container's root: resolved there and nowhere else.
//!
//! Images are hostile: any component may be a symbolic link to anywhere. Every path is resolved by the
//! kernel with the container's root as its root (openat2, RESOLVE_IN_ROOT), and what comes out is a
//! descriptor. No path of the image is ever given to a call that resolves it otherwise.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{
    FileType, Mode, OFlags, ResolveFlags, mkdirat, mknodat, openat, openat2, readlinkat,
};
use rustix::io::Errno;

/// The kernel gives up (EAGAIN) when something is renamed meanwhile: another container's files may be.
const ATTEMPTS: usize = 64;

/// How many links to nowhere are followed in one path; the kernel's own bound for all links.
const LINKS: usize = 40;

/// The root directory of a container's mount tree.
pub(super) struct Root(OwnedFd);

impl AsFd for Root {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Root {
    pub(super) fn new(directory: OwnedFd) -> Self {
        Self(directory)
    }

    /// A handle on what is at `path`; symbolic links lead no further than the root.
    pub(super) fn open(&self, path: &str) -> io::Result<OwnedFd> {
        self.resolve(path, ResolveFlags::empty())
    }

    /// The same, for a path that must not contain any symbolic link.
    pub(super) fn open_plain(&self, path: &str) -> io::Result<OwnedFd> {
        self.resolve(path, ResolveFlags::NO_SYMLINKS)
    }

    fn resolve(&self, path: &str, more: ResolveFlags) -> io::Result<OwnedFd> {
        let how = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS | more;
        for _ in 0..ATTEMPTS {
            match openat2(
                &self.0,
                path,
                OFlags::PATH | OFlags::CLOEXEC,
                Mode::empty(),
                how,
            ) {
                Err(Errno::AGAIN) => {}
                other => return Ok(other?),
            }
        }
        Err(Errno::AGAIN.into())
    }

    /// The directory at `path`, made with its parents (0755) where it is missing. A link to nowhere is
    /// followed, and its target made inside the root.
    pub(super) fn directory(&self, path: &str) -> io::Result<OwnedFd> {
        self.make_directory(path, LINKS)
    }

    fn make_directory(&self, path: &str, links: usize) -> io::Result<OwnedFd> {
        match self.open(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            other => return other,
        }
        let mut sofar = String::from("/");
        let mut rest = parts(path);
        while let Some(part) = rest.next() {
            let parent = self.open(&sofar)?;
            let next = format!("{sofar}/{part}");
            match self.open(&next) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                other => {
                    other?;
                    sofar = next;
                    continue;
                }
            }
            match mkdirat(&parent, part, Mode::from_raw_mode(0o755)) {
                Ok(()) => sofar = next,
                Err(Errno::EXIST) => {
                    let target = target(&parent, part, &sofar)?;
                    let links = links.checked_sub(1).ok_or(Errno::LOOP)?;
                    let remaining: Vec<&str> = rest.collect();
                    return self
                        .make_directory(&format!("{target}/{}", remaining.join("/")), links);
                }
                Err(error) => return Err(error.into()),
            }
        }
        self.open(&sofar)
    }

    /// The file at `path`, made empty where it is missing, or where the link there leads.
    pub(super) fn file(&self, path: &str) -> io::Result<OwnedFd> {
        self.make_file(path, LINKS)
    }

    fn make_file(&self, path: &str, links: usize) -> io::Result<OwnedFd> {
        match self.open(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            other => return other,
        }
        let (parent, name) = self.parent(path)?;
        match mknodat(
            &parent,
            name,
            FileType::RegularFile,
            Mode::from_raw_mode(0o755),
            0,
        ) {
            Ok(()) => Ok(openat(
                &parent,
                name,
                OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC,
                Mode::empty(),
            )?),
            Err(Errno::EXIST) => {
                let above = path
                    .trim_end_matches('/')
                    .rsplit_once('/')
                    .map_or("/", |(above, _)| above);
                let target = target(&parent, name, above)?;
                self.make_file(&target, links.checked_sub(1).ok_or(Errno::LOOP)?)
            }
            Err(error) => Err(error.into()),
        }
    }

    /// The directory that `path` is in, made where it is missing, and the last component.
    pub(super) fn parent<'p>(&self, path: &'p str) -> io::Result<(OwnedFd, &'p str)> {
        let trimmed = path.trim_end_matches('/');
        match trimmed.rsplit_once('/') {
            Some((parent, name)) if !name.is_empty() && name != "." && name != ".." => Ok((
                self.directory(if parent.is_empty() { "/" } else { parent })?,
                name,
            )),
            _ => Err(io::Error::from_raw_os_error(libc::EINVAL)),
        }
    }
}

/// Where the link `name` in `parent` leads, as a path from the root; `above` is the path of `parent`.
fn target(parent: &OwnedFd, name: &str, above: &str) -> io::Result<String> {
    let target = readlinkat(parent, name, Vec::new())?;
    let target = target.to_str().map_err(|_| Errno::ILSEQ)?;
    Ok(if target.starts_with('/') {
        target.into()
    } else {
        format!("{above}/{target}")
    })
}

fn parts(path: &str) -> impl Iterator<Item = &str> {
    path.split('/')
        .filter(|part| !part.is_empty() && *part != ".")
}

/// An absolute path without `.`, `..` and empty components, as runc cleans destinations.
pub(super) fn clean(path: &str) -> String {
    let mut kept: Vec<&str> = Vec::new();
    for part in parts(path) {
        if part == ".." {
            kept.pop();
        } else {
            kept.push(part);
        }
    }
    format!("/{}", kept.join("/"))
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;

    use super::*;

    fn root(name: &str) -> (std::path::PathBuf, Root) {
        let path = std::env::temp_dir().join(format!("husk-inside-{name}-{}", std::process::id()));
        fs::remove_dir_all(&path).ok();
        fs::create_dir_all(path.join("root/etc")).unwrap();
        let directory = fs::File::open(path.join("root")).unwrap();
        (path, Root::new(directory.into()))
    }

    #[test]
    fn links_of_an_image_stay_inside() {
        let (path, root) = root("links");
        symlink("/outside", path.join("root/absolute")).unwrap();
        symlink("../../../outside", path.join("root/relative")).unwrap();
        symlink(path.join("there"), path.join("root/dangling")).unwrap();
        fs::create_dir(path.join("root/outside")).unwrap();
        for link in ["/absolute/made/by/us", "/relative/made2"] {
            root.directory(link).unwrap();
        }
        assert!(path.join("root/outside/made/by/us").is_dir());
        assert!(path.join("root/outside/made2").is_dir());
        root.file("/dangling").unwrap();
        assert!(!path.join("there").exists());
        assert!(
            path.join("root")
                .join(path.strip_prefix("/").unwrap())
                .join("there")
                .is_file()
        );
        assert!(root.directory("/dangling/x").is_err());
        symlink("loop", path.join("root/loop")).unwrap();
        assert!(root.directory("/loop/x").is_err());
        symlink("../to/../gone/./far", path.join("root/etc/far")).unwrap();
        fs::create_dir(path.join("root/to")).unwrap();
        root.directory("/etc/far/away").unwrap();
        assert!(path.join("root/gone/far/away").is_dir());
        assert!(root.open_plain("/absolute").is_err());
        fs::remove_dir_all(path).unwrap();
    }

    #[test]
    fn files_and_their_parents_are_made() {
        let (path, root) = root("files");
        root.file("/a/b/file").unwrap();
        root.file("/a/b/file").unwrap();
        assert!(path.join("root/a/b/file").is_file());
        assert!(root.parent("/").is_err());
        fs::remove_dir_all(path).unwrap();
    }

    #[test]
    fn paths_are_cleaned() {
        assert_eq!(clean("/a/../../b/./c//"), "/b/c");
        assert_eq!(clean("/.."), "/");
    }
}
