//! The shim's log: the FIFO `log` of the bundle, which containerd copies to its own log.
//!
//! containerd may be away or slow. A line that does not fit is dropped; nothing here ever blocks,
//! and holding the FIFO's reading end too means that nothing here dies of EPIPE.

use std::{
    fmt::Write as _,
    fs::File,
    io::{self, Write as _},
    os::unix::fs::OpenOptionsExt,
    path::Path,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use log::{LevelFilter, Log, Metadata, Record};

/// Writes up to this many bytes are atomic on a FIFO (pipe(7)), so lines never mix.
const PIPE_BUF: usize = 4096;

struct FifoLog {
    fifo: File,
}

/// Sends everything from here on to the FIFO `path`. Called once, in serve mode.
pub fn to_fifo(path: &Path, level: LevelFilter) -> io::Result<()> {
    let fifo = File::options()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
        .open(path)?;
    log::set_boxed_logger(Box::new(FifoLog { fifo })).map_err(io::Error::other)?;
    log::set_max_level(level);
    Ok(())
}

impl Log for FifoLog {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.level() <= log::max_level()
    }

    fn log(&self, record: &Record<'_>) {
        if self.enabled(record.metadata()) {
            let line = format_line(record, SystemTime::now());
            // A full FIFO drops the line: see above.
            let _ = (&self.fifo).write(line.as_bytes());
        }
    }

    fn flush(&self) {}
}

/// logrus' text format, which containerd's own log has.
fn format_line(record: &Record<'_>, now: SystemTime) -> String {
    let level = record.level().as_str().to_ascii_lowercase();
    let mut line = String::with_capacity(160);
    let _ = write!(
        line,
        "time=\"{}\" level={level} msg={:?} runtime={}",
        rfc3339(now),
        record.args().to_string(),
        crate::RUNTIME
    );
    if line.len() >= PIPE_BUF {
        let mut end = PIPE_BUF - 8;
        while !line.is_char_boundary(end) {
            end -= 1;
        }
        line.truncate(end);
        line.push_str("…\"");
    }
    line.push('\n');
    line
}

/// UTC with nanoseconds, `2006-01-02T15:04:05.000000000Z`. Times before 1970 show as 1970.
fn rfc3339(time: SystemTime) -> String {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO);
    let (days, second) = (since.as_secs() / 86_400, since.as_secs() % 86_400);
    // Civil date from a day count: years are taken to begin in March, so that the leap day is last.
    let days = days + 719_468;
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year_of_era =
        (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 {
        shifted_month + 3
    } else {
        shifted_month - 9
    };
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    format!(
        "{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}.{:09}Z",
        second / 3600,
        second / 60 % 60,
        second % 60,
        since.subsec_nanos()
    )
}

#[cfg(test)]
mod tests {
    use log::Level;

    use super::*;

    #[test]
    fn dates_are_the_calendars() {
        let at = |seconds| rfc3339(UNIX_EPOCH + Duration::from_secs(seconds));
        assert_eq!(at(0), "1970-01-01T00:00:00.000000000Z");
        assert_eq!(at(951_827_696), "2000-02-29T12:34:56.000000000Z");
        assert_eq!(at(4_102_444_799), "2099-12-31T23:59:59.000000000Z");
    }

    #[test]
    fn a_line_is_one_line_and_atomic() {
        let text = "x\n".repeat(5000);
        let line = format_line(
            &Record::builder()
                .level(Level::Warn)
                .args(format_args!("{text}"))
                .build(),
            UNIX_EPOCH,
        );
        assert!(line.len() <= PIPE_BUF);
        assert!(line.ends_with("…\"\n"));
        assert_eq!(line.matches('\n').count(), 1);
        assert!(line.contains("level=warn msg=\"x\\nx"));
    }

    #[test]
    fn a_fifo_without_reader_neither_blocks_nor_kills() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("log");
        crate::stdio::make_fifo(&path);
        let fifo = File::options()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(&path)
            .unwrap();
        let log = FifoLog { fifo };
        log::set_max_level(LevelFilter::Info);
        for _ in 0..2000 {
            log.log(
                &Record::builder()
                    .level(Level::Info)
                    .args(format_args!("{}", "y".repeat(100)))
                    .build(),
            );
        }
    }
}
