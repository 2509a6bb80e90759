//! The probe's network: an interface that was plugged in, and who answers on it.

use std::{
    fs,
    io::{self, Read, Write},
    net::{Ipv4Addr, TcpListener, TcpStream, UdpSocket},
    os::fd::AsRawFd,
    path::PathBuf,
    thread,
};

use anyhow::{Context, Result};
use husk_tests::{
    machine::ECHO_PORT,
    traffic::{self, BULK_PORT},
};
use rustix::mount::{MountFlags, mount};

fn place(slot: u8) -> PathBuf {
    PathBuf::from(format!("/sys/bus/pci/devices/0000:00:{slot:02x}.0"))
}

/// Looks at the PCI bus again, and gives the interface in `slot` an address of a network of 256.
pub fn set_up(slot: u8, address: Ipv4Addr) -> Result<()> {
    if !PathBuf::from("/sys/bus").exists() {
        fs::create_dir_all("/sys")?;
        mount("sysfs", "/sys", "sysfs", MountFlags::empty(), None).context("mount /sys")?;
    }
    fs::write("/sys/bus/pci/rescan", "1").context("look at the bus again")?;
    let name = interface(slot).context("find the interface")?;
    configure(&name, address).context("configure the interface")
}

/// Takes the device in `slot` from its driver, and forgets it.
pub fn remove(slot: u8) -> Result<()> {
    fs::write(place(slot).join("remove"), "1").context("remove a device")
}

fn interface(slot: u8) -> Result<String> {
    let device = fs::read_dir(place(slot)).context("read the device")?;
    for entry in device.flatten() {
        if entry.file_name().as_encoded_bytes().starts_with(b"virtio") {
            let mut names = fs::read_dir(entry.path().join("net"))?.flatten();
            let name = names.next().context("no interface")?.file_name();
            return Ok(name.to_string_lossy().into_owned());
        }
    }
    anyhow::bail!("it has no driver")
}

fn configure(name: &str, address: Ipv4Addr) -> Result<()> {
    let socket = UdpSocket::bind("0.0.0.0:0")?;
    let ask = |request: libc::Ioctl, interface: &mut libc::ifreq| {
        // SAFETY: a live ifreq, which all of these requests take.
        match unsafe { libc::ioctl(socket.as_raw_fd(), request, &raw mut *interface) } {
            0.. => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    };
    // SAFETY: all-zero is a valid ifreq.
    let mut interface: libc::ifreq = unsafe { std::mem::zeroed() };
    for (place, byte) in interface.ifr_name.iter_mut().zip(name.bytes()) {
        *place = byte as libc::c_char;
    }
    for (request, address) in [
        (libc::SIOCSIFADDR, address),
        (libc::SIOCSIFNETMASK, Ipv4Addr::new(255, 255, 255, 0)),
    ] {
        // sockaddr_in: family, port, address.
        let mut bytes = [0u8; 16];
        bytes[0] = libc::AF_INET as u8;
        bytes[4..8].copy_from_slice(&address.octets());
        // SAFETY: as many bytes as a sockaddr has, any of which are one.
        interface.ifr_ifru.ifru_addr =
            unsafe { std::mem::transmute::<[u8; 16], libc::sockaddr>(bytes) };
        ask(request, &mut interface).context("give it an address")?;
    }
    interface.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
    ask(libc::SIOCSIFFLAGS, &mut interface).context("bring it up")
}

/// Sends back what comes, by TCP and UDP.
pub fn echo() -> Result<()> {
    let listener = listen(ECHO_PORT)?;
    let datagrams =
        UdpSocket::bind(("::", ECHO_PORT)).or_else(|_| UdpSocket::bind(("0.0.0.0", ECHO_PORT)));
    let datagrams = datagrams.context("bind")?;
    serve(listener, |mut stream| {
        stream.set_nodelay(true)?;
        let mut bytes = vec![0; 256 << 10];
        while let Ok(length @ 1..) = stream.read(&mut bytes) {
            stream.write_all(&bytes[..length])?;
        }
        Ok(())
    });
    thread::spawn(move || {
        let mut bytes = vec![0; 64 << 10];
        while let Ok((length, from)) = datagrams.recv_from(&mut bytes) {
            let _ = datagrams.send_to(&bytes[..length], from);
        }
    });
    Ok(())
}

/// One way at a time.
pub fn bulk() -> Result<()> {
    serve(listen(BULK_PORT)?, traffic::serve_bulk);
    Ok(())
}

/// For clients of both families, where there are both.
fn listen(port: u16) -> Result<TcpListener> {
    let listener =
        TcpListener::bind(("::", port)).or_else(|_| TcpListener::bind(("0.0.0.0", port)));
    listener.context("listen")
}

/// A thread for each client.
fn serve(listener: TcpListener, act: impl Fn(TcpStream) -> io::Result<()> + Copy + Send + 'static) {
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            // Clients come and go.
            thread::spawn(move || drop(act(stream)));
        }
    });
}
