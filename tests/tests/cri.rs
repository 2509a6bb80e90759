//! Pods as a kubelet asks for them, through CRI.

use husk_tests::cri::{Handler, Pod};

#[test]
fn a_pods_life() {
    let pod = Pod::run(Handler::Husk);
    assert!(pod.is_ready());
    let words = pod.try_words(&["echo", "hello"]);
    assert_eq!(words, "hello\n");
    let one = pod.idle();
    assert_eq!(one.try_exec(&["hostname"]), "a-pod\n");
    println!("{}", one.try_exec(&["ip", "addr"]));
    println!("{}", one.try_exec(&["cat", "/proc/mounts"]));
    pod.end();
}
