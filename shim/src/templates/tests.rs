//! The store as its users meet it: several at once, and files that are not what they should be.

use std::{
    fs::{self, File, Permissions},
    io::{Read, Write},
    os::unix::fs::{PermissionsExt, symlink},
    path::{Path, PathBuf},
    sync::PoisonError,
    time::{Duration, SystemTime},
};

use super::{
    draft::Draft,
    gc::Limits,
    key::{Ingredients, Key, Scope, tests::config},
    manifest::{MANIFEST, MEMORY, PAGES, STATE},
    store::{Store, Unfit, Unusable, set_immutable},
};
use crate::address::tests::UMASK;

/// Room for everything.
const ALL: Limits<'static> = Limits {
    space: u64::MAX,
    keep: None,
    verify: false,
};

struct Host {
    directory: tempfile::TempDir,
    store: Store,
}

impl Drop for Host {
    fn drop(&mut self) {
        // Immutable files would stay behind.
        let none = Limits { space: 0, ..ALL };
        self.store.gc(none).unwrap();
    }
}

impl Host {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::new(&directory.path().join("templates"));
        Self { directory, store }
    }

    fn made_of(&self, namespace: &str) -> Ingredients {
        let config = config(self.directory.path());
        Ingredients::gather(&config, Scope::Namespace(namespace.into())).unwrap()
    }

    fn draft(&self, made_of: &Ingredients, memory: &str) -> Draft<'_> {
        let draft = Draft::begin(&self.store, &made_of.key()).unwrap().unwrap();
        for (name, text) in [(MEMORY, memory), (STATE, "state"), (PAGES, "pages")] {
            draft
                .file(name)
                .unwrap()
                .write_all(text.as_bytes())
                .unwrap();
        }
        draft
    }

    fn make(&self, namespace: &str) -> (Ingredients, PathBuf) {
        let made_of = self.made_of(namespace);
        self.draft(&made_of, "memory")
            .publish(made_of.clone())
            .unwrap();
        let place = self.store.path().join(made_of.key().as_str());
        (made_of, place)
    }

    fn names(&self) -> Vec<String> {
        self.store.names().unwrap()
    }

    fn read(&self, made_of: &Ingredients) -> String {
        let mut template = self.store.open(made_of).unwrap().unwrap();
        let mut text = String::new();
        template.memory.read_to_string(&mut text).unwrap();
        template.state.read_to_string(&mut text).unwrap();
        template.pages.unwrap().read_to_string(&mut text).unwrap();
        text
    }
}

fn writable(path: &Path) -> File {
    set_immutable(&File::open(path).unwrap(), false).ok();
    fs::set_permissions(path, Permissions::from_mode(0o600)).unwrap();
    File::options().write(true).open(path).unwrap()
}

fn unfit(store: &Store, made_of: &Ingredients) -> Unfit {
    match store.open(made_of) {
        Err(Unusable::Template(unfit)) => unfit,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_store_that_is_open_to_others_says_nothing_of_its_templates() {
    let host = Host::new();
    let (made_of, _) = host.make("a");
    let mode = |mode| {
        fs::set_permissions(host.store.path(), Permissions::from_mode(mode)).unwrap();
    };
    mode(0o777);
    for made_of in [&made_of, &host.made_of("b")] {
        match host.store.open(made_of) {
            Err(Unusable::Place(why)) => assert!(why.contains("has mode 777"), "{why}"),
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(host.store.gc(ALL).unwrap(), []);
    mode(0o700);
    assert_eq!(host.read(&made_of), "memorystatepages");
}

#[test]
fn what_is_published_is_found() {
    let _modes = UMASK.read().unwrap_or_else(PoisonError::into_inner);
    let host = Host::new();
    let made_of = host.made_of("a");
    assert!(host.store.open(&made_of).unwrap().is_none());
    let draft = host.draft(&made_of, "memory");
    assert!(host.store.open(&made_of).unwrap().is_none());
    draft.publish(made_of.clone()).unwrap();
    assert_eq!(host.read(&made_of), "memorystatepages");
    assert!(host.store.open(&host.made_of("b")).unwrap().is_none());
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    let place = host.store.path().join(made_of.key().as_str());
    assert_eq!((mode(host.store.path()), mode(&place)), (0o700, 0o700));
    assert_eq!(mode(&place.join(MEMORY)), 0o400);
    let entries = host.store.list().unwrap();
    assert_eq!((entries.len(), entries[0].verify()), (1, Ok(())));
}

#[test]
fn a_draft_is_one_makers_and_goes_with_it() {
    let host = Host::new();
    let made_of = host.made_of("a");
    let draft = host.draft(&made_of, "memory");
    assert!(Draft::begin(&host.store, &made_of.key()).unwrap().is_none());
    assert_eq!(host.store.gc(ALL).unwrap(), []);
    drop(draft);
    assert!(host.names().is_empty());
    drop(host.draft(&made_of, "memory"));
}

#[test]
fn a_draft_that_was_left_behind_is_garbage_and_in_nobodys_way() {
    let host = Host::new();
    let made_of = host.made_of("a");
    let left = host.store.path().join(format!(".new-{}", made_of.key()));
    let leave = || {
        fs::create_dir_all(&left).unwrap();
        fs::set_permissions(&left, Permissions::from_mode(0o700)).unwrap();
        fs::write(left.join(MEMORY), "half").unwrap();
        set_immutable(&File::open(left.join(MEMORY)).unwrap(), true).ok();
    };
    leave();
    host.draft(&made_of, "whole")
        .publish(made_of.clone())
        .unwrap();
    assert_eq!(host.read(&made_of), "wholestatepages");
    leave();
    let removed = host.store.gc(ALL).unwrap();
    assert_eq!(
        (removed.len(), removed[0].reason.as_str()),
        (1, "left over")
    );
    assert_eq!(host.names(), [made_of.key().to_string()]);
}

#[test]
fn an_open_template_stays_whole_whatever_becomes_of_its_name() {
    let host = Host::new();
    let (made_of, _) = host.make("a");
    let mut open = host.store.open(&made_of).unwrap().unwrap();
    assert!(host.store.remove(&made_of.key(), None).unwrap());
    assert!(!host.store.remove(&made_of.key(), None).unwrap());
    host.draft(&made_of, "other")
        .publish(made_of.clone())
        .unwrap();
    let mut text = String::new();
    open.memory.read_to_string(&mut text).unwrap();
    assert_eq!(text, "memory");
    // Whoever has found fault with the old one does not take the new one away.
    assert!(
        !host
            .store
            .remove(&made_of.key(), Some(open.identity))
            .unwrap()
    );
    assert_eq!(host.read(&made_of), "otherstatepages");
    assert_eq!(host.names().len(), 1);
}

#[test]
fn a_fit_template_is_not_replaced_and_an_unfit_one_is() {
    let host = Host::new();
    let (made_of, place) = host.make("a");
    host.draft(&made_of, "second")
        .publish(made_of.clone())
        .unwrap();
    assert_eq!(host.read(&made_of), "memorystatepages");
    fs::remove_file(place.join(STATE)).unwrap();
    host.draft(&made_of, "third")
        .publish(made_of.clone())
        .unwrap();
    assert_eq!(host.read(&made_of), "thirdstatepages");
    assert_eq!(host.names().len(), 1);
}

#[test]
fn every_change_is_noticed_without_reading() {
    type Damage = fn(&Path);
    let damages: [(&str, Damage); 12] = [
        ("memory has 7 bytes, not 6", |at| {
            writable(&at.join(MEMORY)).set_len(7).unwrap();
        }),
        ("memory was changed", |at| {
            let path = at.join(MEMORY);
            let before = fs::metadata(&path).unwrap().modified().unwrap();
            let mut file = writable(&path);
            file.write_all(b"M").unwrap();
            file.set_modified(before).unwrap();
        }),
        ("open memory: No such file", |at| {
            drop(writable(&at.join(MEMORY)));
            fs::remove_file(at.join(MEMORY)).unwrap();
        }),
        ("state was changed", |at| {
            fs::copy(at.join(STATE), at.join("x")).unwrap();
            fs::rename(at.join("x"), at.join(STATE)).unwrap();
        }),
        ("open state: Too many levels", |at| {
            fs::rename(at.join(STATE), at.join("x")).unwrap();
            symlink("x", at.join(STATE)).unwrap();
        }),
        ("state is no regular file", |at| {
            fs::remove_file(at.join(STATE)).unwrap();
            fs::create_dir(at.join(STATE)).unwrap();
        }),
        ("pages has mode 666", |at| {
            fs::set_permissions(at.join(PAGES), Permissions::from_mode(0o666)).unwrap();
        }),
        ("open template.json: No such file", |at| {
            fs::remove_file(at.join(MANIFEST)).unwrap();
        }),
        ("template.json: ", |at| {
            let text = fs::read_to_string(at.join(MANIFEST)).unwrap();
            fs::write(at.join(MANIFEST), &text[..text.len() / 2]).unwrap();
        }),
        ("template.json: version 0, not 1", |at| {
            let text = fs::read_to_string(at.join(MANIFEST)).unwrap();
            fs::write(
                at.join(MANIFEST),
                text.replacen("\"version\": 1", "\"version\": 0", 1),
            )
            .unwrap();
        }),
        ("made of something else", |at| {
            let text = fs::read_to_string(at.join(MANIFEST)).unwrap();
            fs::write(
                at.join(MANIFEST),
                text.replace("\"memory_mib\": 256", "\"memory_mib\": 258"),
            )
            .unwrap();
        }),
        ("its directory has mode 770", |at| {
            fs::set_permissions(at, Permissions::from_mode(0o770)).unwrap();
        }),
    ];
    for (expected, damage) in damages {
        let host = Host::new();
        let (made_of, place) = host.make("a");
        damage(&place);
        let unfit = unfit(&host.store, &made_of);
        assert!(
            unfit.reason.contains(expected),
            "{expected}: {}",
            unfit.reason
        );
        assert!(
            host.store
                .remove(&made_of.key(), Some(unfit.identity))
                .unwrap()
        );
        assert!(host.names().is_empty());
    }
}

#[test]
fn a_rotten_byte_is_found_by_reading() {
    let host = Host::new();
    let (made_of, place) = host.make("a");
    // As a disk would do it: nothing but the byte changes, so the manifest is made to agree.
    let path = place.join(MANIFEST);
    let text = fs::read_to_string(&path).unwrap();
    let was = host.store.list().unwrap()[0]
        .manifest
        .as_ref()
        .unwrap()
        .state
        .sha256
        .clone();
    fs::write(
        &path,
        text.replace(&was, &was.replace(|c: char| c.is_ascii_digit(), "a")),
    )
    .unwrap();
    assert!(host.store.open(&made_of).unwrap().is_some());
    assert_eq!(host.store.gc(ALL).unwrap(), []);
    let removed = host
        .store
        .gc(Limits {
            verify: true,
            ..ALL
        })
        .unwrap();
    assert!(removed[0].reason.starts_with("state has another checksum"));
    assert!(host.names().is_empty());
}

#[test]
fn those_used_last_stay_when_there_is_no_space_for_all() {
    let host = Host::new();
    let keys: Vec<Key> = ["a", "b", "c", "d"]
        .into_iter()
        .enumerate()
        .map(|(age, namespace)| {
            let (made_of, place) = host.make(namespace);
            let used = SystemTime::now() - Duration::from_secs(1000 * (age as u64 + 1));
            File::open(place).unwrap().set_modified(used).unwrap();
            made_of.key()
        })
        .collect();
    // A use makes the oldest the youngest.
    host.store.open(&host.made_of("d")).unwrap().unwrap();
    let two = Limits {
        space: 2 << 20,
        ..ALL
    };
    let removed = host.store.gc(two).unwrap();
    assert_eq!(removed.len(), 2);
    let left: Vec<_> = host
        .store
        .list()
        .unwrap()
        .into_iter()
        .map(|entry| entry.key)
        .collect();
    assert_eq!(left, [keys[3].clone(), keys[0].clone()]);
    let keep = Limits {
        space: 0,
        keep: Some(&keys[0]),
        verify: false,
    };
    host.store.gc(keep).unwrap();
    assert_eq!(host.names(), [keys[0].to_string()]);
}

#[test]
fn what_no_pod_of_this_host_can_use_is_garbage() {
    let host = Host::new();
    host.make("a");
    fs::write(host.directory.path().join("vmlinux"), "another").unwrap();
    let (new, _) = host.make("a");
    let removed = host.store.gc(ALL).unwrap();
    assert_eq!(removed.len(), 1);
    assert!(
        removed[0].reason.ends_with("vmlinux has changed"),
        "{removed:?}"
    );
    assert_eq!(host.names(), [new.key().to_string()]);
}

#[test]
fn many_at_once_start_from_whole_templates_only() {
    let host = Host::new();
    let made_of = host.made_of("a");
    let key = made_of.key();
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                for _ in 0..50 {
                    if let Some(draft) = Draft::begin(&host.store, &key).unwrap() {
                        for (name, text) in [(MEMORY, "memory"), (STATE, "state")] {
                            draft
                                .file(name)
                                .unwrap()
                                .write_all(text.as_bytes())
                                .unwrap();
                        }
                        draft.publish(made_of.clone()).unwrap();
                    }
                }
            });
        }
        scope.spawn(|| {
            for _ in 0..50 {
                host.store.remove(&key, None).unwrap();
            }
        });
        for _ in 0..2 {
            scope.spawn(|| {
                for _ in 0..200 {
                    // One whose files go while they are opened is unfit, which a pod survives.
                    let Ok(Some(mut template)) = host.store.open(&made_of) else {
                        continue;
                    };
                    let mut text = String::new();
                    template.memory.read_to_string(&mut text).unwrap();
                    template.state.read_to_string(&mut text).unwrap();
                    assert_eq!(text, "memorystate");
                }
            });
        }
    });
    assert!(
        host.names().iter().all(|name| *name == key.to_string()),
        "{:?}",
        host.names()
    );
}

#[test]
fn what_is_no_directory_is_unfit_and_goes() {
    let host = Host::new();
    let put: [fn(&Path); 2] = [
        |place| fs::write(place, "text").unwrap(),
        |place| symlink("/nowhere", place).unwrap(),
    ];
    for put in put {
        let (made_of, place) = host.make("a");
        let remove = |store: &Store| store.remove(&made_of.key(), None).unwrap();
        assert!(remove(&host.store));
        put(&place);
        let unfit = unfit(&host.store, &made_of);
        assert_eq!(host.store.list().unwrap().len(), 1);
        assert!(host.store.list().unwrap()[0].check().is_err());
        let gone = host.store.remove(&made_of.key(), Some(unfit.identity));
        assert!(gone.unwrap());
        assert!(host.names().is_empty());
        put(&place);
        assert_eq!(host.store.gc(ALL).unwrap().len(), 1);
        put(&place);
        host.make("a");
        assert_eq!(host.read(&made_of), "memorystatepages");
        assert!(remove(&host.store));
    }
}
