//! Where a standard stream goes or comes from, as clients of containerd write it: nothing, the path of a FIFO,
//! `file://` or `binary://`. Only words are looked at here.

use std::{
    ffi::OsString,
    os::unix::ffi::OsStringExt,
    path::{Path, PathBuf},
};

/// One end of a stream on the host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    None,
    /// A FIFO, or what else lies there.
    Path(PathBuf),
    /// A file that is made if it is missing, with its directories, and appended to.
    File(PathBuf),
    /// A program of the host that takes the output.
    Program(Program),
}

/// `binary://<path>?<name>=<value>&…`: each name and each value is an argument.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Program {
    pub path: PathBuf,
    pub args: Vec<OsString>,
}

impl Place {
    /// Says what is wrong with a URI that is none of them.
    pub fn parse(uri: &str) -> Result<Self, &'static str> {
        let Some((scheme, rest)) = uri.split_once("://") else {
            return Ok(match uri {
                "" => Self::None,
                path => Self::Path(path.into()),
            });
        };
        let (path, query) = rest.split_once('?').unwrap_or((rest, ""));
        let path = PathBuf::from(decode(path, false)?);
        match scheme {
            "fifo" => Ok(Self::Path(path)),
            _ if !path.is_absolute() => Err("not an absolute path"),
            "file" => Ok(Self::File(path)),
            "binary" => Ok(Self::Program(Program {
                path,
                args: args(query)?,
            })),
            _ => Err("husk takes FIFOs, file:// and binary:// only"),
        }
    }

    /// What is opened by its path.
    pub fn path(&self) -> Option<&Path> {
        match self {
            Self::Path(path) | Self::File(path) => Some(path),
            Self::None | Self::Program(_) => None,
        }
    }
}

/// Of a name that is there twice only the first value counts, as for containerd.
fn args(query: &str) -> Result<Vec<OsString>, &'static str> {
    let mut args = Vec::new();
    let mut names = Vec::new();
    for pair in query.split('&').filter(|pair| !pair.is_empty()) {
        let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
        let (name, value) = (decode(name, true)?, decode(value, true)?);
        if !names.contains(&name) {
            names.push(name.clone());
            args.extend([name, value]);
        }
    }
    Ok(args)
}

/// Takes `%XX` back, and in a query `+`.
fn decode(text: &str, in_query: bool) -> Result<OsString, &'static str> {
    let mut bytes = text.bytes();
    let mut decoded = Vec::with_capacity(text.len());
    let digit = |byte: Option<u8>| {
        let digit = byte.and_then(|byte| char::from(byte).to_digit(16));
        let digit = digit.and_then(|digit| u8::try_from(digit).ok());
        digit.ok_or("a % without two hexadecimal digits")
    };
    while let Some(byte) = bytes.next() {
        decoded.push(match byte {
            b'%' => digit(bytes.next())? << 4 | digit(bytes.next())?,
            b'+' if in_query => b' ',
            byte => byte,
        });
    }
    Ok(OsString::from_vec(decoded))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_four_kinds() {
        let place = |uri| Place::parse(uri).unwrap();
        assert_eq!(place(""), Place::None);
        assert_eq!(place("/run/a%20b"), Place::Path("/run/a%20b".into()));
        assert_eq!(place("fifo:///run/x"), Place::Path("/run/x".into()));
        assert_eq!(
            place("file:///var/log/a%20b.log?maxsize=3"),
            Place::File("/var/log/a b.log".into())
        );
        let logger = Program {
            path: "/usr/bin/logger".into(),
            args: ["--tag", "a b", "-x", "", "k", "v=w"]
                .map(Into::into)
                .into(),
        };
        assert_eq!(
            place("binary:///usr/bin/logger?--tag=a+b&-x&k=v%3Dw&k=again"),
            Place::Program(logger)
        );
    }

    #[test]
    fn what_is_wrong_is_said() {
        for (uri, words) in [
            ("ttrpc+unix:///x", "FIFOs, file:// and binary://"),
            ("file://log", "not an absolute path"),
            ("binary://?x", "not an absolute path"),
            ("file:///a%2", "hexadecimal"),
            ("binary:///a?%zz", "hexadecimal"),
        ] {
            let error = Place::parse(uri).unwrap_err();
            assert!(error.contains(words), "{uri}: {error}");
        }
    }
}
