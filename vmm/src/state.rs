//! The state file of a saved machine: everything but its memory, in a frame.
//!
//! ```text
//! 0   magic "huskstat"              16  length of the body in bytes, u64
//! 8   version of the frame, u32     24  body: a `Machine` message of protos/state.proto
//! 12  CRC-32 (IEEE) of the body, u32                       all numbers little-endian
//! ```
//!
//! Here it is framed, and checked before anybody looks into it. What a message means is known where
//! it is made: each device reads its own, and takes nothing in it for granted.

use std::{fs::File, io, os::unix::fs::FileExt};

use protobuf::Message;

#[allow(warnings, clippy::all, missing_docs)]
mod generated {
    include!(concat!(env!("OUT_DIR"), "/state.rs"));
}
pub use generated::*;

const MAGIC: [u8; 8] = *b"huskstat";
const VERSION: u32 = 1;
const HEADER: usize = 24;
/// No machine's state is longer: 64 vCPUs at 16 KiB, a console of 64 KiB, and room.
const BODY_MAX: u64 = 16 << 20;

/// The husk that reads and writes.
pub const HUSK: &str = env!("CARGO_PKG_VERSION");

/// Why a state cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    #[error("state: {0}")]
    Read(#[source] io::Error),
    #[error("state: not a state file of husk")]
    Magic,
    #[error("state: format {0}, this husk reads format {VERSION}")]
    Version(u32),
    #[error("state: {got} bytes, its header says {said}")]
    Length { said: u64, got: u64 },
    #[error("state: damaged, its checksum is not the one it was written with")]
    Checksum,
    #[error("state: {0}")]
    Message(#[from] protobuf::Error),
    #[error("state: written by husk {0}, this is {HUSK}")]
    Husk(String),
    #[error("state: {0}")]
    Content(&'static str),
}

/// Writes `machine` to `file`, which must be empty.
///
/// # Errors
/// Those of writing.
pub fn write(file: &File, machine: &Machine) -> io::Result<()> {
    file.write_all_at(&encode(machine)?, 0)
}

/// Reads what [`write`] wrote.
///
/// # Errors
/// The file cannot be read, was damaged, or is of another husk.
pub fn read(file: &File) -> Result<Machine, StateError> {
    let length = file.metadata().map_err(StateError::Read)?.len();
    let most = BODY_MAX.saturating_add(HEADER as u64);
    let mut bytes = vec![0; length.min(most) as usize];
    file.read_exact_at(&mut bytes, 0)
        .map_err(StateError::Read)?;
    decode(&bytes)
}

/// The bytes of a state file.
///
/// # Errors
/// Those of protobuf.
pub fn encode(machine: &Machine) -> io::Result<Vec<u8>> {
    let body = machine.write_to_bytes().map_err(io::Error::other)?;
    let mut bytes = MAGIC.to_vec();
    bytes.extend(VERSION.to_le_bytes());
    bytes.extend(crc32fast::hash(&body).to_le_bytes());
    bytes.extend((body.len() as u64).to_le_bytes());
    bytes.extend(body);
    Ok(bytes)
}

/// What [`encode`] made bytes of.
///
/// # Errors
/// They are damaged, or of another husk.
pub fn decode(bytes: &[u8]) -> Result<Machine, StateError> {
    let (magic, rest) = bytes.split_first_chunk().ok_or(StateError::Magic)?;
    if *magic != MAGIC {
        return Err(StateError::Magic);
    }
    let short = StateError::Content("shorter than its header");
    let Some((version, rest)) = rest.split_first_chunk() else {
        return Err(short);
    };
    let version = u32::from_le_bytes(*version);
    if version != VERSION {
        return Err(StateError::Version(version));
    }
    let Some((checksum, rest)) = rest.split_first_chunk() else {
        return Err(short);
    };
    let Some((said, body)) = rest.split_first_chunk() else {
        return Err(short);
    };
    let (said, got) = (u64::from_le_bytes(*said), body.len() as u64);
    if said != got {
        return Err(StateError::Length { said, got });
    }
    if crc32fast::hash(body) != u32::from_le_bytes(*checksum) {
        return Err(StateError::Checksum);
    }
    let machine = Machine::parse_from_bytes(body)?;
    match machine.husk.as_str() {
        HUSK => Ok(machine),
        _ => Err(StateError::Husk(machine.husk)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn machine() -> Machine {
        Machine {
            husk: HUSK.to_owned(),
            memory_bytes: 64 << 20,
            vcpus: vec![Vcpu {
                regs: vec![0xa5; 144],
                ..Default::default()
            }],
            ..Default::default()
        }
    }

    #[test]
    fn what_was_written_is_read() {
        assert_eq!(decode(&encode(&machine()).unwrap()).unwrap(), machine());
    }

    #[test]
    fn a_state_cut_anywhere_is_refused() {
        let bytes = encode(&machine()).unwrap();
        for length in 0..bytes.len() {
            assert!(decode(&bytes[..length]).is_err(), "{length} bytes");
        }
        let mut longer = bytes.clone();
        longer.push(0);
        assert!(matches!(decode(&longer), Err(StateError::Length { .. })));
    }

    #[test]
    fn every_flipped_bit_is_noticed() {
        let bytes = encode(&machine()).unwrap();
        for bit in 0..bytes.len() * 8 {
            let mut damaged = bytes.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            assert!(decode(&damaged).is_err(), "bit {bit}");
        }
    }

    #[test]
    fn another_husk_s_state_is_refused_by_name() {
        let other = Machine {
            husk: "0.0.9".to_owned(),
            ..machine()
        };
        let error = decode(&encode(&other).unwrap()).unwrap_err();
        assert_eq!(
            error.to_string(),
            format!("state: written by husk 0.0.9, this is {HUSK}")
        );
    }
}
