//! What containerd writes to the stdin of `start`: up to 2.2 the runtime options alone, an `Any`; from 2.3 on
//! `BootstrapParams` (api/runtime/bootstrap/v1), which has them among its extensions. Decoded by hand, as only a few
//! of its fields are news to us.

use protobuf::{CodedInputStream, Message, well_known_types::any::Any};

use crate::options::is_known;

/// What was told beside the command line. Empty where nothing was.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Told {
    /// The runtime options: an encoded `Any`.
    pub options: Vec<u8>,
    /// Where containerd takes events.
    pub ttrpc_address: String,
    pub grpc_address: String,
    pub debug: bool,
}

/// Log levels up to this one are DEBUG or more.
const DEBUG: i32 = -4;

impl Told {
    /// Reads what came for the start of `id`. Both messages begin with two strings; those of `BootstrapParams` are
    /// the id and the namespace, and no type of options is named like a container.
    pub fn read(bytes: &[u8], id: &str, namespace: &str) -> Self {
        match parameters(bytes) {
            Ok(found) if found.id == id && found.namespace == namespace => found.told,
            _ => Self {
                options: bytes.to_vec(),
                ..Self::default()
            },
        }
    }
}

#[derive(Default)]
struct Parameters {
    id: String,
    namespace: String,
    told: Told,
}

fn parameters(bytes: &[u8]) -> protobuf::Result<Parameters> {
    let mut found = Parameters::default();
    let mut input = CodedInputStream::from_bytes(bytes);
    while let Some(tag) = input.read_raw_tag_or_eof()? {
        // A tag is (field << 3) | wire type; strings and messages are type 2.
        match tag {
            0x0a => found.id = input.read_string()?,
            0x12 => found.namespace = input.read_string()?,
            0x18 => found.told.debug = input.read_int32()? <= DEBUG,
            0x2a => found.told.ttrpc_address = input.read_string()?,
            0x32 => found.told.grpc_address = input.read_string()?,
            0x42 => {
                let extension = input.read_bytes()?;
                if let Some(options) = options(&extension)? {
                    found.told.options = options.write_to_bytes()?;
                }
            }
            _ => protobuf::rt::skip_field_for_tag(tag, &mut input)?,
        }
    }
    Ok(found)
}

/// The runtime options in an `Extension`, which is an `Any` in a message; none if it is of another kind.
fn options(extension: &[u8]) -> protobuf::Result<Option<Any>> {
    let mut input = CodedInputStream::from_bytes(extension);
    let mut found = None;
    while let Some(tag) = input.read_raw_tag_or_eof()? {
        match tag {
            0x0a => {
                let any = Any::parse_from_bytes(&input.read_bytes()?)?;
                found = Some(any).filter(|any| is_known(&any.type_url));
            }
            _ => protobuf::rt::skip_field_for_tag(tag, &mut input)?,
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn any(kind: &str) -> Vec<u8> {
        let any = Any {
            type_url: kind.into(),
            value: b"\x1a\x04a = ".to_vec(),
            ..Any::default()
        };
        any.write_to_bytes().unwrap()
    }

    fn field(number: u8, bytes: &[u8]) -> Vec<u8> {
        [
            &[number << 3 | 2, u8::try_from(bytes.len()).unwrap()],
            bytes,
        ]
        .concat()
    }

    #[test]
    fn options_alone_stay_what_they_are() {
        let bytes = any("runtimeoptions.v1.Options");
        let told = Told::read(&bytes, "c", "default");
        assert_eq!(told.options, bytes);
        assert_eq!(Told::read(b"", "c", "default"), Told::default());
    }

    #[test]
    fn of_the_parameters_what_is_ours_is_taken() {
        let options = any("runtimeoptions.v1.Options");
        let mut bytes = [field(1, b"c"), field(2, b"default")].concat();
        // LOG_LEVEL_DEBUG, -4 in ten bytes.
        bytes.extend(b"\x18\xfc\xff\xff\xff\xff\xff\xff\xff\xff\x01");
        bytes.extend(field(4, b"2.3.0"));
        bytes.extend(field(5, b"/run/c.ttrpc"));
        bytes.extend(field(6, b"/run/c"));
        for extension in [
            any("other.Options"),
            options.clone(),
            any("cri.PodSandboxConfig"),
        ] {
            bytes.extend(field(8, &field(1, &extension)));
        }
        let told = Told::read(&bytes, "c", "default");
        let expected = Told {
            options,
            ttrpc_address: "/run/c.ttrpc".into(),
            grpc_address: "/run/c".into(),
            debug: true,
        };
        assert_eq!(told, expected);
        // Somebody else's: whatever it is, it is looked at where options are.
        assert_eq!(Told::read(&bytes, "d", "default").options, bytes);
        assert_eq!(Told::read(&bytes[..5], "c", "default").options, &bytes[..5]);
    }
}
