//! Port-forward: who dials localhost in the pod's network namespace on the host, as containerd does for `kubectl port-forward`, reaches the
//! pod's servers, wherever they listen.

use std::{
    io::{self, ErrorKind, Read, Write},
    net::{Shutdown, TcpStream},
    thread,
    time::{Duration, Instant},
};

use husk_tests::{
    census::Census,
    cni::Cni,
    command::{self, PATIENCE, Running, eventually, signal_by_name},
    ctr::{Container, PROBE_MOUNT, Runtime},
    netns::{Namespace, POD, POD6, dial},
    traffic::echo_over,
};

fn idle_in(namespace: &str, flags: &[&str]) -> Container {
    pod_in(namespace, flags, &["sleep", "86400"])
}

fn pod_in(namespace: &str, flags: &[&str], args: &[&str]) -> Container {
    let network = format!("network:/run/netns/{namespace}");
    let mut all = vec!["--null-io", "--with-ns", &network, "--mount", PROBE_MOUNT];
    all.extend(flags);
    Container::detached(Runtime::Husk, &all, args)
}

/// Servers in the pod, until they are dropped.
fn servers(pod: &Container, at: &[&str]) -> Running {
    let args = [&["/probe", "echo"][..], at].concat();
    command::start(&mut pod.exec_command(&[], &args), b"")
}

/// What comes back of a line and its end.
fn said_back(mut stream: TcpStream, line: &str) -> io::Result<String> {
    stream.write_all(line.as_bytes())?;
    stream.shutdown(Shutdown::Write)?;
    let mut got = String::new();
    stream.read_to_string(&mut got)?;
    Ok(got)
}

/// Waits until a server answers.
#[track_caller]
fn answers(namespace: &str, to: &str) {
    let mut last = None;
    let answered = eventually(Instant::now() + PATIENCE, || {
        let said = dial(namespace, to).and_then(|stream| said_back(stream, to));
        match said {
            Ok(said) => return Some(said),
            Err(e) => last = Some(e),
        }
        thread::sleep(Duration::from_millis(50));
        None
    });
    assert_eq!(answered.as_deref(), Some(to), "{last:?}");
}

/// Whoever dials is told at once that nobody listens.
#[track_caller]
fn is_refused(namespace: &str, to: &str) {
    let said = dial(namespace, to).and_then(|stream| said_back(stream, to));
    let error = said.expect_err(to);
    let kinds = [
        ErrorKind::ConnectionReset,
        ErrorKind::ConnectionRefused,
        ErrorKind::BrokenPipe,
    ];
    assert!(kinds.contains(&error.kind()), "{to}: {error}");
}

#[test]
fn localhost_on_the_host_reaches_the_pods_servers_wherever_they_listen() {
    let cni = Cni::add("forward", 8087);
    let pod = idle_in(&cni.name, &[]);
    let at = ["127.0.0.1:7001", "[::1]:7002", "0.0.0.0:7003", "[::]:7004"];
    let servers = servers(&pod, &at);
    // containerd dials IPv4 first, and IPv6 only where that is refused.
    for port in 7001..=7004 {
        for host in ["127.0.0.1", "[::1]"] {
            answers(&cni.name, &format!("{host}:{port}"));
        }
    }
    answers(&cni.name, "127.1.2.3:7003");
    // The pod's own addresses are as little answered for.
    answers(&cni.name, &format!("{}:7003", cni.address(false)));
    answers(&cni.name, &format!("[{}]:7004", cni.address(true)));
    for nobody in ["127.0.0.1:7009", "[::1]:7009", "127.1.2.3:7001"] {
        is_refused(&cni.name, nobody);
    }
    is_refused(&cni.name, &format!("{}:7001", cni.address(false)));

    // A container that joins, and what it leaves.
    let sandbox = format!("io.kubernetes.cri.sandbox-id={}", pod.id);
    let second = idle_in(&cni.name, &["--annotation", &sandbox]);
    let script =
        "mkdir /tmp/www; echo of the second >/tmp/www/page; httpd -p 127.0.0.1:80 -h /tmp/www";
    second.exec(&["sh", "-c", script]).ok();
    let page = [
        "netns",
        "exec",
        &cni.name,
        "busybox",
        "wget",
        "-T",
        "60",
        "-qO-",
        "http://127.0.0.1/page",
    ];
    let page = command::run(std::process::Command::new("ip").args(page), b"");
    assert_eq!(page.ok(), "of the second\n");
    second.remove();
    is_refused(&cni.name, "127.0.0.1:80");
    answers(&cni.name, "127.0.0.1:7001");
    drop(servers);
    pod.remove();
    cni.delete();
}

const BYTES: u64 = 8 << 20;

#[test]
fn every_byte_comes_back_also_from_many_at_once() {
    let namespace = Namespace::new("bytes", 1500);
    let pod = idle_in(&namespace.name, &[]);
    let servers = servers(&pod, &["127.0.0.1:7"]);
    answers(&namespace.name, "127.0.0.1:7");
    echo_over(dial(&namespace.name, "127.0.0.1:7").expect("dial"), BYTES).expect("an echo");
    let streams: Vec<_> = (0..40)
        .map(|_| dial(&namespace.name, "127.0.0.1:7").expect("dial"))
        .collect();
    let echoes: Vec<_> = streams
        .into_iter()
        .map(|stream| thread::spawn(move || echo_over(stream, BYTES / 32)))
        .collect();
    for echo in echoes {
        echo.join().expect("a thread").expect("an echo");
    }
    drop(servers);
    pod.remove();
}

#[test]
fn connections_end_with_the_pod_and_nothing_listens_any_more() {
    let namespace = Namespace::new("over", 1500);
    let state = namespace.state();
    let before = Census::take();
    let refused = |to| {
        let error = dial(&namespace.name, to).expect_err(to);
        assert_eq!(error.kind(), ErrorKind::ConnectionRefused, "{to}");
    };
    refused("127.0.0.1:7");
    for end in ["", "husk-vmm", "containerd-shim-husk-v2"] {
        let (at, at6) = (format!("{POD}:7"), format!("[{POD6}]:7"));
        let servers = ["/probe", "echo", &at, &at6, "127.0.0.1:7"];
        let pod = pod_in(&namespace.name, &[], &servers);
        answers(&namespace.name, "127.0.0.1:7");
        let open: Vec<TcpStream> = servers[2..]
            .iter()
            .map(|to| {
                let mut stream = dial(&namespace.name, to).expect(to);
                stream.write_all(b"x").expect("send");
                stream.read_exact(&mut [0]).expect("receive");
                stream
            })
            .collect();
        if !end.is_empty() {
            signal_by_name("-9", end);
            pod.wait_stopped();
        }
        pod.remove();
        for mut stream in open {
            // An end or a reset.
            match stream.read(&mut [0]) {
                Ok(count) => assert_eq!(count, 0, "after the end of {end:?}"),
                Err(e) => assert_eq!(
                    e.kind(),
                    ErrorKind::ConnectionReset,
                    "after the end of {end:?}"
                ),
            }
        }
        before.assert_restored();
        assert_eq!(namespace.state(), state, "after the end of {end:?}");
        refused("127.0.0.1:7");
        refused("[::1]:7");
    }
}
