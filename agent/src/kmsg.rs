//! The agent's log: records in the kernel's own log, `/dev/kmsg`.
//!
//! There is no other place: the guest has no tty and no file of ours. What the kernel is told to
//! print (warnings and worse) appears on the VMM's console. A panic of the agent is written as
//! critical and ends PID 1, and so the guest, with its message as the last words.

use std::fmt::Write as _;
use std::fs::{File, OpenOptions};
use std::io::{self, Write as _};
use std::sync::OnceLock;

use log::{Level, LevelFilter, Log, Metadata, Record};

use crate::sys;

/// The kernel's own bound on a record is 1024 bytes with its prefix.
const RECORD: usize = 976;
/// syslog(2): prints everything.
const CONSOLE_ALL: i32 = 8;

static KMSG: OnceLock<File> = OnceLock::new();

struct Kmsg;

impl Log for Kmsg {
    fn enabled(&self, _: &Metadata) -> bool {
        true
    }
    fn log(&self, record: &Record) {
        let priority = match record.level() {
            Level::Error => 3,
            Level::Warn => 4,
            Level::Info => 6,
            Level::Debug | Level::Trace => 7,
        };
        write(priority, &record.args().to_string());
    }
    fn flush(&self) {}
}

/// One write is one record; a newline would begin another, without a level.
fn write(priority: u8, message: &str) {
    let Some(mut kmsg) = KMSG.get() else { return };
    let mut record = format!("<{priority}>husk-agent: ");
    for c in message.chars().take_while({
        let mut length = record.len();
        move |c| {
            length = length.saturating_add(c.len_utf8());
            length < RECORD
        }
    }) {
        record.write_char(if c == '\n' { ' ' } else { c }).ok();
    }
    kmsg.write_all(record.as_bytes()).ok();
}

/// Begins to log, warnings and worse, and to report panics.
pub fn start() -> io::Result<()> {
    let file = OpenOptions::new().write(true).open("/dev/kmsg")?;
    KMSG.set(file)
        .map_err(|_| io::Error::other("the log is open already"))?;
    log::set_logger(&Kmsg).map_err(|error| io::Error::other(error.to_string()))?;
    log::set_max_level(LevelFilter::Warn);
    std::panic::set_hook(Box::new(|panic| {
        fatal(&panic.to_string());
    }));
    Ok(())
}

/// Last words: ends PID 1, at which the kernel panics and the VMM hears of it.
pub fn fatal(message: &str) -> ! {
    write(2, message);
    sys::exit(101)
}

/// Obeys `husk.log=LEVEL` of the kernel's command line, and makes the kernel print as much.
pub fn obey(command_line: &str) {
    let Some(level) = command_line
        .split_whitespace()
        .find_map(|word| word.strip_prefix("husk.log="))
    else {
        return;
    };
    match level.parse::<LevelFilter>() {
        Ok(level) => {
            log::set_max_level(level);
            if level > LevelFilter::Warn {
                sys::console_level(CONSOLE_ALL).ok();
                // Without this the kernel drops all but ten records in five seconds; it wants the newline.
                std::fs::write("/proc/sys/kernel/printk_devkmsg", "on\n").ok();
            }
        }
        Err(_) => log::warn!("kernel command line: husk.log={level} is no level"),
    }
}
