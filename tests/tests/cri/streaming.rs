//! Streams through containerd's CRI server, as `kubectl exec` and `kubectl attach` have them.

use husk_tests::{
    cri::{Handler, Pod, Wanted},
    streaming::{Ended, STDERR, STDOUT},
};

use crate::exec::wait_for_log;

pub fn exec_is_streamed(handler: Handler) {
    let pod = Pod::run(handler);
    let container = pod.idle();
    let script = "echo ready; read a; echo \"out $a\"; echo \"err $a\" >&2; exit 5";
    let mut streams = container.exec_streams(&["sh", "-c", script], Wanted::STREAMS);
    streams.wait_for(STDOUT, "ready");
    streams.say("words\n");
    let ended = Ended {
        stdout: "ready\nout words\n".into(),
        stderr: "err words\n".into(),
        code: 5,
    };
    assert_eq!(streams.finish(), ended);

    // A mebibyte is there to the last byte.
    let script = "head -c 1048576 /dev/zero | tr '\\0' x";
    let ended = container
        .exec_streams(&["sh", "-c", script], Wanted::STREAMS)
        .finish();
    assert_eq!((ended.stdout.len(), ended.code), (1 << 20, 0));
    assert!(ended.stdout.bytes().all(|byte| byte == b'x'));
    pod.end();
}

pub fn exec_has_a_terminal(handler: Handler) {
    let pod = Pod::run(handler);
    let container = pod.idle();
    let script = "tty; while ! test -e /done; do stty size; sleep 0.2; done; exit 6";
    let mut streams = container.exec_streams(&["sh", "-c", script], Wanted::TERMINAL);
    streams.wait_for(STDOUT, "/dev/pts/");
    streams.resize(91, 33);
    streams.wait_for(STDOUT, "33 91");
    streams.resize(120, 50);
    streams.wait_for(STDOUT, "50 120");
    container.try_exec(&["touch", "/done"]);
    let ended = streams.finish();
    assert_eq!((ended.code, &*ended.stderr), (6, ""));
    pod.end();
}

pub fn attach_is_streamed(handler: Handler) {
    let pod = Pod::run(handler);
    let script = "echo ready; read a; echo \"out $a\"; echo \"err $a\" >&2; read a; exit 0";
    let mut config = pod.container(&["sh", "-c", script]);
    config.stdin = true;
    let container = pod.start(config);
    wait_for_log(&container, "ready");
    let mut streams = container.attach(Wanted::STREAMS);
    streams.say("words\n");
    streams.wait_for(STDOUT, "out words\n");
    streams.wait_for(STDERR, "err words\n");
    // Another one after that, when the first is gone.
    drop(streams);
    let mut streams = container.attach(Wanted::STREAMS);
    streams.say("end\n");
    assert_eq!(container.exit_code(), 0);
    wait_for_log(&container, "out words\n");
    drop(streams);
    pod.end();
}

pub fn attach_has_a_terminal(handler: Handler) {
    let pod = Pod::run(handler);
    let script =
        "exec 3<&0; echo ready; (while :; do stty size <&3; sleep 0.2; done) & read a; exit 8";
    let mut config = pod.container(&["sh", "-c", script]);
    (config.stdin, config.tty) = (true, true);
    let container = pod.start(config);
    wait_for_log(&container, "ready");
    let mut streams = container.attach(Wanted::TERMINAL);
    streams.resize(91, 33);
    streams.wait_for(STDOUT, "33 91");
    streams.say("end\n");
    assert_eq!(container.exit_code(), 8);
    pod.end();
}

/// Also to servers that only the pod's own localhost reaches, of either family.
pub fn ports_are_forwarded(handler: Handler) {
    let pod = Pod::run(handler);
    let container = pod.idle();
    let script = "mkdir /tmp/www; echo of the pod >/tmp/www/page
        httpd -p 127.0.0.1:80 -h /tmp/www; httpd -p [::1]:81 -h /tmp/www";
    container.try_exec(&["sh", "-c", script]);
    for port in [80, 81] {
        let mut forwarded = pod.forward(port);
        forwarded.send(b"GET /page HTTP/1.0\r\n\r\n");
        forwarded.wait_for("of the pod\n");
    }
    // Where nobody listens, that is what comes of it, and the next one is none the worse.
    let mut nobody = pod.forward(82);
    nobody.send(b"GET /page HTTP/1.0\r\n\r\n");
    nobody.wait_for_end();
    assert_eq!(nobody.received(), "");
    let mut forwarded = pod.forward(80);
    forwarded.send(b"GET /page HTTP/1.0\r\n\r\n");
    forwarded.wait_for("of the pod\n");
    pod.end();
}
