//! Which network interface is the device in a slot of the PCI bus: sysfs says so, once the bus has been looked at.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use husk_netlink::{News, news};

use crate::fault::Fault;

const PCI: &str = "/sys/bus/pci";
/// For the driver to make an interface of a device that was found.
const LIMIT: Duration = Duration::from_secs(10);

/// The names that the interfaces in these slots have now. Has the bus looked at again for those that are not there yet.
pub(super) fn find(slots: &[u32]) -> Result<Vec<String>, Fault> {
    let pci = Path::new(PCI);
    let look = || {
        slots
            .iter()
            .map(|slot| name(pci, *slot))
            .collect::<Vec<_>>()
    };
    let mut found = look();
    if found.iter().any(Option::is_none) {
        // Hears of what comes after the last look.
        let failed = |error| Fault::of_call("listen for interfaces", error);
        let news = News::of(&[news::LINKS]).map_err(failed)?;
        let rescan = pci.join("rescan");
        fs::write(&rescan, "1")
            .map_err(|error| Fault::of_call(&format!("write {}", rescan.display()), error))?;
        let deadline = Instant::now() + LIMIT;
        loop {
            found = look();
            let left = deadline.saturating_duration_since(Instant::now());
            if found.iter().all(Option::is_some) || left.is_zero() {
                break;
            }
            news.wait(left).map_err(failed)?;
            news::take(&news, &[]).map_err(failed)?;
        }
    }
    let named = slots.iter().zip(found).map(|(slot, name)| {
        name.ok_or_else(|| {
            Fault::NotFound(format!(
                "slot {slot}: no network interface within {LIMIT:?}"
            ))
        })
    });
    named.collect()
}

/// Has the kernel forget the device in a slot, working or not. None is fine.
pub(super) fn remove(slot: u32) -> Result<(), Fault> {
    let switch = device(Path::new(PCI), slot).join("remove");
    match fs::write(&switch, "1") {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(Fault::of_call(
            &format!("write {}", switch.display()),
            error,
        )),
        _ => Ok(()),
    }
}

fn device(pci: &Path, slot: u32) -> PathBuf {
    pci.join(format!("devices/0000:00:{slot:02x}.0"))
}

/// `virtio<number>/net/<name>` below the device.
fn name(pci: &Path, slot: u32) -> Option<String> {
    let entries = |directory: &Path| fs::read_dir(directory).into_iter().flatten().flatten();
    let virtio = entries(&device(pci, slot))
        .find(|entry| entry.file_name().to_string_lossy().starts_with("virtio"))?;
    let interface = entries(&virtio.path().join("net")).next()?;
    Some(interface.file_name().to_string_lossy().into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_interface_is_found_by_its_slot() {
        let pci = std::env::temp_dir().join(format!("husk-pci-{}", std::process::id()));
        let at = pci.join("devices/0000:00:0a.0");
        fs::create_dir_all(at.join("virtio3/net/eth1")).unwrap();
        fs::create_dir_all(at.join("msi_irqs")).unwrap();
        fs::create_dir_all(pci.join("devices/0000:00:0b.0/virtio4")).unwrap();
        let names = [10, 11, 12].map(|slot| name(&pci, slot));
        fs::remove_dir_all(&pci).unwrap();
        assert_eq!(names, [Some("eth1".into()), None, None]);
    }
}
