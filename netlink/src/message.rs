//! Netlink messages (netlink(7)): a header of 16 bytes, a fixed part of the message's kind, and attributes, which may hold
//! attributes; everything in the machine's own byte order, and everything begins at a multiple of 4.

/// `struct nlmsghdr`.
pub(crate) const HEADER: usize = 16;
/// `struct nlattr`.
const ATTRIBUTE: usize = 4;
/// `NLA_F_NESTED` and `NLA_F_NET_BYTEORDER` are no part of an attribute's kind.
const KIND: u16 = 0x3fff;

/// A request, as it is put together.
#[derive(Debug)]
pub struct Request(Vec<u8>);

impl Request {
    /// `kind` is `RTM_*`; `flags` are `NLM_F_*` beside those that every request has.
    pub fn new(kind: u16, flags: i32) -> Self {
        let mut bytes = vec![0; HEADER];
        let flags = (flags | libc::NLM_F_REQUEST) as u16;
        bytes[4..6].copy_from_slice(&kind.to_ne_bytes());
        bytes[6..8].copy_from_slice(&flags.to_ne_bytes());
        Self(bytes)
    }

    /// Appends fixed fields.
    pub fn fixed(mut self, fields: &[u8]) -> Self {
        self.0.extend_from_slice(fields);
        self.pad();
        self
    }

    pub fn attribute(mut self, kind: u16, value: &[u8]) -> Self {
        self.put(kind, value);
        self
    }

    pub fn u32(self, kind: u16, value: u32) -> Self {
        self.attribute(kind, &value.to_ne_bytes())
    }

    /// A string with the NUL that ends it.
    pub fn string(self, kind: u16, value: &str) -> Self {
        let mut bytes = value.as_bytes().to_vec();
        bytes.push(0);
        self.attribute(kind, &bytes)
    }

    /// An attribute that holds what `fill` appends.
    pub fn nested(mut self, kind: u16, fill: impl FnOnce(Self) -> Self) -> Self {
        let start = self.0.len();
        self.put(kind, &[]);
        let mut filled = fill(self);
        let length = filled.0.len() - start;
        filled.set_length(start, length);
        filled
    }

    fn put(&mut self, kind: u16, value: &[u8]) {
        let start = self.0.len();
        self.0.extend_from_slice(&[0; 2]);
        self.0.extend_from_slice(&kind.to_ne_bytes());
        self.0.extend_from_slice(value);
        self.set_length(start, ATTRIBUTE + value.len());
        self.pad();
    }

    /// What does not fit in 16 bits the kernel refuses as malformed.
    fn set_length(&mut self, start: usize, length: usize) {
        let length = u16::try_from(length).unwrap_or(0).to_ne_bytes();
        self.0[start..start + 2].copy_from_slice(&length);
    }

    fn pad(&mut self) {
        let padded = self.0.len().next_multiple_of(4);
        self.0.resize(padded, 0);
    }

    pub(crate) fn flag(&mut self, flags: i32) {
        self.0[6] |= (flags & 0xff) as u8;
        self.0[7] |= (flags >> 8) as u8;
    }

    pub(crate) fn finish(mut self, sequence: u32) -> Vec<u8> {
        let length = self.0.len() as u32;
        self.0[0..4].copy_from_slice(&length.to_ne_bytes());
        self.0[8..12].copy_from_slice(&sequence.to_ne_bytes());
        self.0
    }
}

/// The attributes in a run of bytes. Ends at the first that is none.
#[derive(Clone, Copy, Debug)]
pub struct Attributes<'a>(pub &'a [u8]);

impl<'a> Iterator for Attributes<'a> {
    /// Kind and value.
    type Item = (u16, &'a [u8]);

    fn next(&mut self) -> Option<Self::Item> {
        let length = usize::from(u16(self.0)?);
        let kind = u16(self.0.get(2..)?)? & KIND;
        let value = self.0.get(ATTRIBUTE..length)?;
        self.0 = self.0.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, value))
    }
}

/// The number that bytes begin with.
pub fn u16(bytes: &[u8]) -> Option<u16> {
    Some(u16::from_ne_bytes(*bytes.first_chunk()?))
}

/// The number that bytes begin with.
pub fn u32(bytes: &[u8]) -> Option<u32> {
    Some(u32::from_ne_bytes(*bytes.first_chunk()?))
}

/// A string up to its NUL.
pub fn string(bytes: &[u8]) -> String {
    let text = bytes.split(|byte| *byte == 0).next().unwrap_or_default();
    String::from_utf8_lossy(text).into_owned()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn attributes_come_back_as_they_were_put() {
        let request = Request::new(16, libc::NLM_F_ACK)
            .fixed(&[7; 5])
            .string(3, "eth0")
            .nested(18, |inner| inner.u32(1, 9).attribute(2, &[1, 2, 3]))
            .attribute(4, &[]);
        let bytes = request.finish(5);
        assert_eq!(u32(&bytes).unwrap() as usize, bytes.len());
        assert_eq!(&bytes[16..24], [7, 7, 7, 7, 7, 0, 0, 0]);
        let found: Vec<_> = Attributes(&bytes[24..]).collect();
        assert_eq!(found.len(), 3);
        assert_eq!((found[0].0, string(found[0].1)), (3, "eth0".into()));
        let inner: Vec<_> = Attributes(found[1].1).collect();
        assert_eq!(inner, [(1, &9u32.to_ne_bytes()[..]), (2, &[1, 2, 3])]);
        assert_eq!(found[2], (4, &[][..]));
    }

    #[test]
    fn what_is_cut_off_ends_the_list() {
        for bytes in [
            &[][..],
            &[1],
            &[8, 0, 1, 0, 0],
            &[3, 0, 1, 0],
            &[0, 0, 0, 0],
        ] {
            assert_eq!(Attributes(bytes).count(), 0, "{bytes:?}");
        }
    }
}
