//! Text from a guest, made fit for logs and errors: bounded, one line at a time, nothing that a
//! terminal would obey. It never fails.

/// Bytes that one message may have.
const MESSAGE_LIMIT: usize = 1024;
/// Characters of a console line that are shown.
const LINE_LIMIT: usize = 160;

/// One line of at most [`MESSAGE_LIMIT`] bytes without control characters.
pub fn message(text: &str) -> String {
    let mut line = String::with_capacity(text.len().min(MESSAGE_LIMIT));
    for c in text.trim().chars() {
        if line.len() + c.len_utf8() > MESSAGE_LIMIT {
            line.push('…');
            break;
        }
        line.push(if is_printable(c) { c } else { ' ' });
    }
    line
}

/// The last `lines` lines of a guest's console that say anything.
pub fn console_tail(console: &[u8], lines: usize) -> Vec<String> {
    let text = String::from_utf8_lossy(console);
    let mut tail: Vec<String> = text
        .lines()
        .rev()
        .map(|line| {
            let shown = line.trim_end().chars().take(LINE_LIMIT);
            shown
                .map(|c| if is_printable(c) { c } else { ' ' })
                .collect()
        })
        .filter(|line: &String| !line.trim().is_empty())
        .take(lines)
        .collect();
    tail.reverse();
    tail
}

fn is_printable(c: char) -> bool {
    // Bidirectional overrides rewrite what a reader sees just as escape sequences do.
    !c.is_control() && !matches!(c, '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_is_one_bounded_line() {
        assert_eq!(message("open /x:\n\u{1b}[31mno\r\n"), "open /x:  [31mno");
        assert!(message(&"ü".repeat(4000)).len() <= MESSAGE_LIMIT + '…'.len_utf8());
    }

    #[test]
    fn the_tail_is_the_last_lines_that_say_something() {
        let console = b"one\n\n\x1b[2Jtwo\r\n\xffthree\n\n";
        assert_eq!(console_tail(console, 2), [" [2Jtwo", "\u{fffd}three"]);
        assert!(console_tail(b"", 3).is_empty());
        assert_eq!(console_tail(&[b'x'; 9000], 1)[0].len(), LINE_LIMIT);
    }
}
