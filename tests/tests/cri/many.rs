//! Many pods at once.

use std::{
    thread,
    time::{Duration, Instant},
};

use husk_tests::{
    census::Census,
    cri::{Handler, Pod},
};

const PODS: usize = 20;

/// Twenty take no longer together than one after another, and all of them go.
pub fn twenty_pods_at_once(handler: Handler) {
    let before = Census::take();
    // What all pay for once.
    Pod::run(handler).end();
    let one = |_| {
        let pod = Pod::run(handler);
        let container = pod.idle();
        (pod, container)
    };
    let begin = Instant::now();
    let sequence: Vec<_> = (0..PODS).map(one).collect();
    let in_sequence = begin.elapsed();
    end(sequence);
    before.assert_restored();

    let begin = Instant::now();
    let pods: Vec<_> = thread::scope(|scope| {
        let asked: Vec<_> = (0..PODS)
            .map(|number| scope.spawn(move || one(number)))
            .collect();
        asked
            .into_iter()
            .map(|asked| asked.join().expect("a pod"))
            .collect()
    });
    let at_once = begin.elapsed();
    for (pod, container) in &pods {
        assert!(pod.is_ready());
        assert_eq!(container.try_exec(&["hostname"]), "a-pod\n");
    }
    end(pods);
    before.assert_restored();
    println!("{PODS} pods: {in_sequence:?} in sequence, {at_once:?} at once");
    assert!(
        at_once <= in_sequence + Duration::from_secs(1),
        "{at_once:?}, and {in_sequence:?} in sequence"
    );
}

fn end<T: Send>(pods: Vec<(Pod, T)>) {
    thread::scope(|scope| {
        for (pod, _) in pods {
            scope.spawn(move || pod.end());
        }
    });
}
