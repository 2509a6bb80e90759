//! What tests and measures send over a pod's network, and have back. In the pod, `husk-probe traffic` answers.

use std::{
    io::{self, ErrorKind, Read, Write},
    net::{IpAddr, Shutdown, SocketAddr, TcpStream, UdpSocket},
    thread,
    time::{Duration, Instant},
};

use crate::{
    command::{PATIENCE, eventually},
    machine::ECHO_PORT,
};

/// Whose server takes bytes, or gives some.
pub const BULK_PORT: u16 = 8;

/// What a client of [`BULK_PORT`] says first: that it will send until it shuts down, and then wants to know how many bytes
/// came; or that it wants so many (eight bytes, little endian).
const SEND: u8 = b'>';
const RECEIVE: u8 = b'<';

const PIECE: usize = 256 << 10;

/// Serves one client of [`BULK_PORT`].
///
/// # Errors
/// Those of the connection.
pub fn serve_bulk(mut stream: TcpStream) -> io::Result<()> {
    let mut way = [0];
    stream.read_exact(&mut way)?;
    let mut bytes = vec![0; PIECE];
    if way == [SEND] {
        let mut all = 0u64;
        loop {
            match stream.read(&mut bytes)? {
                0 => return stream.write_all(&all.to_le_bytes()),
                length => all += length as u64,
            }
        }
    }
    let mut left = [0; 8];
    stream.read_exact(&mut left)?;
    let mut left = u64::from_le_bytes(left);
    while left > 0 {
        let now = left.min(PIECE as u64);
        stream.write_all(&bytes[..now as usize])?;
        left -= now;
    }
    Ok(())
}

/// Connects as soon as somebody listens there.
///
/// # Errors
/// Nobody does.
pub fn connect(address: IpAddr, port: u16) -> io::Result<TcpStream> {
    let place = SocketAddr::new(address, port);
    let stream = eventually(Instant::now() + PATIENCE / 2, || {
        let connected = TcpStream::connect_timeout(&place, PATIENCE);
        if connected.is_err() {
            thread::sleep(Duration::from_millis(100));
        }
        connected.ok()
    });
    let stream = stream.ok_or_else(|| io::Error::new(ErrorKind::TimedOut, place.to_string()))?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// How long so many bytes take to the server.
///
/// # Errors
/// They do not get there.
pub fn send_bulk(address: IpAddr, bytes: u64) -> io::Result<Duration> {
    let mut stream = connect(address, BULK_PORT)?;
    let piece = vec![0; PIECE];
    let began = Instant::now();
    stream.write_all(&[SEND])?;
    for _ in 0..bytes / PIECE as u64 {
        stream.write_all(&piece)?;
    }
    stream.shutdown(Shutdown::Write)?;
    let mut came = [0; 8];
    stream.read_exact(&mut came)?;
    let came = u64::from_le_bytes(came);
    match came == bytes {
        true => Ok(began.elapsed()),
        false => Err(io::Error::other(format!("{came} of {bytes} bytes came"))),
    }
}

/// How long so many bytes take from the server.
///
/// # Errors
/// They do not come.
pub fn receive_bulk(address: IpAddr, bytes: u64) -> io::Result<Duration> {
    let mut stream = connect(address, BULK_PORT)?;
    let mut piece = vec![0; PIECE];
    let began = Instant::now();
    stream.write_all(&[RECEIVE])?;
    stream.write_all(&bytes.to_le_bytes())?;
    let mut came = 0;
    while came < bytes {
        match stream.read(&mut piece)? {
            0 => return Err(ErrorKind::UnexpectedEof.into()),
            length => came += length as u64,
        }
    }
    Ok(began.elapsed())
}

/// How long one byte takes there and back, each time.
///
/// # Errors
/// It does not come back.
pub fn round_trips(address: IpAddr, count: usize) -> io::Result<Vec<Duration>> {
    let mut stream = connect(address, ECHO_PORT)?;
    let mut trip = || {
        let began = Instant::now();
        stream.write_all(&[1])?;
        stream.read_exact(&mut [0])?;
        Ok(began.elapsed())
    };
    (0..count).map(|_| trip()).collect()
}

/// Sends so many bytes, no block of which is like another, while it has them back.
///
/// # Errors
/// Others come back.
pub fn echo_stream(address: IpAddr, bytes: u64) -> io::Result<()> {
    echo_over(connect(address, ECHO_PORT)?, bytes)
}

/// As [`echo_stream`], over a connection that is there, to its end.
///
/// # Errors
/// Others come back.
pub fn echo_over(mut stream: TcpStream, bytes: u64) -> io::Result<()> {
    let mut writing = stream.try_clone()?;
    let blocks = bytes / PIECE as u64;
    let writer = thread::spawn(move || {
        let mut block = noise();
        for number in 0..blocks {
            block[..8].copy_from_slice(&number.to_le_bytes());
            writing.write_all(&block)?;
        }
        writing.shutdown(Shutdown::Write)
    });
    let (mut block, mut got) = (noise(), vec![0; PIECE]);
    for number in 0..blocks {
        block[..8].copy_from_slice(&number.to_le_bytes());
        stream.read_exact(&mut got)?;
        if got != block {
            let which = format!("block {number} was changed on its way");
            return Err(io::Error::other(which));
        }
    }
    if stream.read(&mut got)? != 0 {
        return Err(io::Error::other("more came than was sent"));
    }
    writer
        .join()
        .map_err(|_| io::Error::other("the writer panicked"))?
}

/// Xorshift: no two words are the same.
fn noise() -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    };
    (0..PIECE / 8).flat_map(|_| next()).collect()
}

/// Sends a datagram of so many bytes, in as many fragments as it takes, and has it back.
///
/// # Errors
/// Another comes back, or none.
pub fn echo_datagram(address: IpAddr, length: usize) -> io::Result<()> {
    let any: IpAddr = match address {
        IpAddr::V4(_) => [0; 4].into(),
        IpAddr::V6(_) => [0u16; 8].into(),
    };
    let socket = UdpSocket::bind((any, 0))?;
    socket.set_read_timeout(Some(PATIENCE))?;
    let sent: Vec<u8> = noise().into_iter().take(length).collect();
    socket.send_to(&sent, (address, ECHO_PORT))?;
    let mut got = vec![0; 1 << 16];
    let came = socket.recv(&mut got)?;
    match got[..came] == sent {
        true => Ok(()),
        false => Err(io::Error::other(format!("{came} other bytes came back"))),
    }
}
