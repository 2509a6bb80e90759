//! What containerd tells those who listen (`ctr events`).

use std::{
    io::{BufRead, BufReader},
    process::{Child, Stdio},
    sync::{Arc, Mutex},
    thread,
    time::Instant,
};

use crate::{
    command::{self, PATIENCE, eventually},
    ctr::{ctr, fresh_id},
};

/// A subscription; ends when dropped.
pub struct Events {
    child: Child,
    lines: Arc<Mutex<Vec<String>>>,
}

impl Events {
    /// Returns once something that was published after the beginning has come.
    #[track_caller]
    pub fn subscribe() -> Self {
        let mut child = ctr(&["events"])
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .expect("start ctr events");
        let lines = Arc::new(Mutex::new(Vec::new()));
        let (copy, out) = (Arc::clone(&lines), child.stdout.take().expect("piped"));
        thread::spawn(move || {
            for line in BufReader::new(out).lines().map_while(Result::ok) {
                copy.lock().expect("no panic").push(line);
            }
        });
        let events = Events { child, lines };
        let heard = eventually(Instant::now() + PATIENCE, || {
            let label = format!("husk-test={}", fresh_id("heard"));
            command::run(&mut ctr(&["namespace", "label", "default", &label]), b"").ok();
            let heard = events
                .all()
                .iter()
                .any(|line| line.contains("/namespaces/"));
            heard.then_some(())
        });
        assert!(heard.is_some(), "ctr events says nothing");
        events
    }

    pub fn all(&self) -> Vec<String> {
        self.lines.lock().expect("no panic").clone()
    }

    /// Those of a container: the topic's last word, and the line.
    pub fn of(&self, container: &str) -> Vec<(String, String)> {
        let about = format!("\"container_id\":\"{container}\"");
        let of = |line: String| {
            let compact = line.replace("\": \"", "\":\"");
            let topic = line
                .split_whitespace()
                .find_map(|word| word.strip_prefix("/tasks/"));
            compact
                .contains(&about)
                .then(|| (topic.unwrap_or_default().to_owned(), compact))
        };
        self.all().into_iter().filter_map(of).collect()
    }

    /// Waits until a container has one with this topic, and returns it.
    #[track_caller]
    pub fn wait_for(&self, container: &str, topic: &str) -> String {
        let found = eventually(Instant::now() + PATIENCE / 4, || {
            let mut all = self.of(container).into_iter();
            all.find_map(|(found, line)| (found == topic).then_some(line))
        });
        found.unwrap_or_else(|| panic!("no {topic} of {container} in {:#?}", self.all()))
    }

    /// The topics of a container's events, in their order.
    pub fn topics(&self, container: &str) -> Vec<String> {
        self.of(container)
            .into_iter()
            .map(|(topic, _)| topic)
            .collect()
    }

    /// How often an exit of a container's init was told, and with which statuses.
    pub fn exits(&self, container: &str) -> Vec<u32> {
        let own = format!("\"id\":\"{container}\"");
        let status = |(topic, line): (String, String)| {
            if topic != "exit" || !line.contains(&own) {
                return None;
            }
            let Some((_, rest)) = line.split_once("\"exit_status\":") else {
                // Zero is left out.
                return Some(0);
            };
            let digits: String = rest
                .trim_start()
                .chars()
                .take_while(char::is_ascii_digit)
                .collect();
            Some(digits.parse().expect("a number"))
        };
        self.of(container).into_iter().filter_map(status).collect()
    }
}

impl Drop for Events {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
