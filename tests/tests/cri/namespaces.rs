//! What the containers of a pod have in common: network, IPC, and their processes where that is asked for.

use std::{thread, time::Instant};

use husk_proto::cri as api;
use husk_tests::{
    command::{PATIENCE, eventually},
    cri::{Container, Handler, Pod},
    ctr::PROBE,
};

use crate::life::mount;

pub fn network_and_ipc_are_the_pods(handler: Handler) {
    let pod = Pod::run(handler);
    let start = || {
        let mut config = pod.container(&["sleep", "86400"]);
        config.mounts.push(mount(PROBE, "/probe"));
        pod.start(config)
    };
    let (one, two) = (start(), start());
    one.try_exec(&[
        "sh",
        "-c",
        "mkdir /tmp/www; echo of one >/tmp/www/page; httpd -p 127.0.0.1:80 -h /tmp/www",
    ]);
    let page = two.try_exec(&["wget", "-T", "60", "-qO-", "http://127.0.0.1/page"]);
    assert_eq!(page, "of one\n");

    // POSIX' shared memory and message queues by their names, System V's by its key.
    one.try_exec(&[
        "sh",
        "-c",
        "echo words >/dev/shm/file; touch /dev/mqueue/queue",
    ]);
    let found = two.try_exec(&["sh", "-c", "cat /dev/shm/file; ls /dev/mqueue"]);
    assert_eq!(found, "words\nqueue\n");
    for place in ["/dev/shm/page", "key:4711"] {
        meet(place, &one, &two);
    }
    let of = |container: &Container| {
        let script = "cd /proc/1/ns; for kind in net ipc uts; do readlink $kind; done";
        container.try_exec(&["sh", "-c", script])
    };
    assert_eq!(of(&one), of(&two));

    // Shared memory is the pod's, not the container's.
    one.stop(0).expect("stop");
    one.remove().expect("remove");
    assert_eq!(two.try_exec(&["cat", "/dev/shm/file"]), "words\n");
    pod.end();
}

/// Each sees what the other one writes to a page of memory.
#[track_caller]
fn meet(place: &str, one: &Container, two: &Container) {
    let words = ["/probe", "meet", place];
    let both = thread::scope(|scope| {
        let first = scope.spawn(|| one.exec(&words));
        [two.exec(&words), first.join().expect("no panic")]
    });
    for answer in both {
        let error = String::from_utf8_lossy(&answer.stderr).into_owned();
        assert_eq!(answer.exit_code, 0, "{place}: {error}");
    }
}

fn processes(container: &Container) -> Vec<String> {
    let text = container.try_exec(&["ps", "-o", "pid,stat,args"]);
    text.lines()
        .skip(1)
        .map(|line| line.trim().into())
        .collect()
}

pub fn processes_are_the_containers(handler: Handler) {
    let pod = Pod::run(handler);
    let one = pod.start(pod.container(&["sleep", "11111"]));
    let two = pod.start(pod.container(&["sleep", "22222"]));
    for (container, own, other) in [(&one, "11111", "22222"), (&two, "22222", "11111")] {
        let seen = processes(container);
        assert!(
            seen.iter()
                .any(|line| line.starts_with("1 ") && line.contains(own)),
            "{seen:#?}"
        );
        assert!(!seen.iter().any(|line| line.contains(other)), "{seen:#?}");
    }
    pod.end();
}

pub fn processes_are_the_pods_where_asked_for(handler: Handler) {
    let pod = Pod::with(handler, |config| {
        let context = config
            .linux
            .mut_or_insert_default()
            .security_context
            .mut_or_insert_default();
        context.namespace_options.mut_or_insert_default().pid = api::NamespaceMode::POD.into();
    });
    let one = pod.start(pod.container(&["sleep", "11111"]));
    // Its child outlives its parent, and ends before our look.
    let script = "sh -c 'sleep 33333 & sleep 0.1 &'; exec sleep 22222";
    let two = pod.start(pod.container(&["sh", "-c", script]));
    let clean = eventually(Instant::now() + PATIENCE, || {
        let seen = processes(&one);
        let all = ["11111", "22222", "33333"];
        let there = all
            .iter()
            .all(|word| seen.iter().any(|line| line.contains(word)));
        let clean = !seen
            .iter()
            .any(|line| line.contains(" Z") || line.contains("0.1"));
        (there && clean).then_some(())
    });
    assert!(clean.is_some(), "{:#?}", processes(&one));
    let first = processes(&one).remove(0);
    assert!(
        first.starts_with("1 ") && !first.contains("sleep"),
        "{first}"
    );

    // What a container has left behind ends with it, and nobody stays unburied.
    two.stop(0).expect("stop");
    let gone = eventually(Instant::now() + PATIENCE, || {
        let seen = processes(&one);
        let left =
            |line: &String| line.contains("22222") || line.contains("33333") || line.contains(" Z");
        (!seen.iter().any(left)).then_some(())
    });
    assert!(gone.is_some(), "{:#?}", processes(&one));
    pod.end();
}
