//! The same specification run by runc on this machine and by the agent: what the container sees of its files must
//! be the same. Where there is no runc, that is said.

use std::path::Path;
use std::process::{Command, Stdio};

use serde_json::{Value, json};

use crate::rig::{Rig, rig};

/// What runc's container says; its own words where it refuses.
fn under_runc(rig: &Rig, spec: &Value, name: &str) -> Result<String, String> {
    let bundle = rig.image().with_extension(format!("bundle-{name}"));
    std::fs::create_dir_all(&bundle).unwrap();
    std::fs::write(bundle.join("config.json"), spec.to_string()).unwrap();
    let id = format!("husk-beside-{name}-{}", std::process::id());
    // The rig collects every child of this process, so the status comes with the words.
    let script = "runc run --bundle \"$0\" \"$1\" 2>/dev/null; echo \"status $?\"";
    let mut running = Command::new("sh")
        .args(["-c", script])
        .arg(&bundle)
        .arg(&id)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut out = String::new();
    let pipe = running.stdout.as_mut().unwrap();
    std::io::Read::read_to_string(pipe, &mut out).unwrap();
    running.wait().ok();
    std::fs::remove_dir_all(bundle).unwrap();
    match out.strip_suffix("status 0\n") {
        Some(out) => Ok(out.to_owned()),
        None => Err(out),
    }
}

/// A line of mountinfo without what is never the same: numbers of mounts and devices, and where the image lies.
fn comparable(line: &str, image: &Path) -> String {
    let Some((mount, whole)) = line.split_once(" - ") else {
        return line.to_owned();
    };
    let fields: Vec<&str> = mount.split(' ').skip(3).collect();
    // Whether this machine's mounts are shared shows in runc's, and not in a guest.
    let fields: Vec<&str> = fields
        .into_iter()
        .filter(|field| !field.starts_with("master:"))
        .collect();
    let line = format!("{} - {whole}", fields.join(" "));
    let line = line
        .replace(image.to_str().unwrap(), "IMAGE")
        // Over masked directories, as runc has it from 1.3 on.
        .replace(",size=4k,nr_inodes=1", "");
    // A sysfs of the same network is one file system, whoever mounts it.
    match line.contains(" - sysfs ") {
        true => line.rsplit_once(' ').unwrap().0.to_owned(),
        false => line,
    }
}

/// What differs for a reason: the link to /proc/kcore, which this machine may not have and is there all the same;
/// the group of a mqueue in a user namespace, which nobody has with runc; the mode of a tmpfs, which old runcs set
/// later.
fn is_known(line: &str) -> bool {
    line.starts_with("/dev/core ")
        || line.starts_with("/dev/mqueue directory 1777 0 ")
        || line.starts_with("/ /etc rw,relatime - tmpfs m rw")
}

const LOOK: &str = "cat /proc/self/mountinfo; id; busybox pwd; hostname; cat /proc/self/uid_map; \
    busybox find /dev /m /etc -xdev -exec busybox stat -c '%n %F %a %u %g %t %T' '{}' ';' | busybox sort; \
    cat /proc/self/timens_offsets; true";

#[test]
fn files_look_as_under_runc() {
    with_rig!(rig, {
        if !["/usr/sbin/runc", "/usr/bin/runc"]
            .iter()
            .any(|path| Path::new(path).exists())
        {
            eprintln!("SKIPPED: no runc here");
            return;
        }
        let tmpfs = |options: Value| json!([{"destination": "/m", "type": "tmpfs", "source": "m", "options": options}]);
        let bind = |options: Value| json!([{"destination": "/m", "type": "bind", "source": rig.image().join("etc"), "options": options}]);
        let user = json!({
            "namespaces": [{"type": "pid"}, {"type": "ipc"}, {"type": "uts"}, {"type": "mount"}, {"type": "user"},
                {"type": "network"}],
            "uidMappings": [{"containerID": 0, "hostID": 100_000, "size": 65536}],
            "gidMappings": [{"containerID": 0, "hostID": 100_000, "size": 65536}],
        });
        let cases = [
            ("plain", json!([]), json!({})),
            ("ro", tmpfs(json!(["ro", "nosuid", "size=64k"])), json!({})),
            (
                "times",
                tmpfs(json!(["noatime", "relatime", "nodiratime"])),
                json!({}),
            ),
            (
                "strict",
                tmpfs(json!(["noatime", "strictatime"])),
                json!({}),
            ),
            (
                "mode",
                tmpfs(json!(["mode=1750", "uid=3", "noexec", "sync"])),
                json!({}),
            ),
            (
                "again",
                json!([
                    {"destination": "/m", "type": "tmpfs", "source": "m"},
                    {"destination": "/m", "type": "tmpfs", "source": "m", "options": ["remount", "ro", "size=32k"]},
                ]),
                json!({}),
            ),
            (
                "copy",
                json!([
                    {"destination": "/etc", "type": "tmpfs", "source": "m", "options": ["tmpcopyup"]},
                ]),
                json!({}),
            ),
            ("bind", bind(json!(["bind"])), json!({})),
            (
                "bind-ro",
                bind(json!(["rbind", "ro", "nosuid", "nodev", "rprivate"])),
                json!({}),
            ),
            (
                "bind-slave",
                bind(json!(["rbind", "rslave", "noatime", "sync"])),
                json!({}),
            ),
            (
                "bind-shared",
                bind(json!(["rbind", "rprivate", "rshared"])),
                json!({}),
            ),
            (
                "file",
                json!([
                    {"destination": "/m/deep/file", "type": "bind", "source": rig.image().join("etc/passwd"), "options": ["bind", "ro"]},
                ]),
                json!({}),
            ),
            (
                "relative",
                json!([{"destination": "m/x/../y", "type": "tmpfs", "source": "m"}]),
                json!({}),
            ),
            (
                "nested",
                json!([
                    {"destination": "/m", "type": "tmpfs", "source": "m", "options": ["ro"]},
                    {"destination": "/m/n", "type": "tmpfs", "source": "n", "options": ["mode=700"]},
                    {"destination": "/m/n/p", "type": "proc", "source": "proc", "options": ["ro", "hidepid=2"]},
                ]),
                json!({}),
            ),
            (
                "dev-ro",
                json!([
                    {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "ro", "mode=755"]},
                ]),
                json!({}),
            ),
            (
                "masked",
                json!([]),
                json!({"maskedPaths": ["/etc/passwd", "/home", "/nosuch/x"], "readonlyPaths": ["/etc", "/nosuch"]}),
            ),
            (
                "masked-below-file",
                json!([]),
                json!({"maskedPaths": ["/etc/passwd/x"]}),
            ),
            (
                "closed-below-file",
                json!([]),
                json!({"readonlyPaths": ["/etc/passwd/x"]}),
            ),
            ("user", json!([]), user),
            (
                "inside-proc",
                json!([{"destination": "/proc/1", "type": "tmpfs", "source": "m"}]),
                json!({}),
            ),
            (
                "over-proc",
                json!([{"destination": "/proc", "type": "tmpfs", "source": "m"}]),
                json!({}),
            ),
            (
                "nofs",
                json!([{"destination": "/m", "type": "nofs", "source": "m"}]),
                json!({}),
            ),
        ];
        let mut differences = Vec::new();
        for (name, mounts, linux) in cases {
            let image = rig.fresh_image(name);
            let mut spec = rig.spec(&["sh", "-c", LOOK]);
            spec["root"]["path"] = json!(image);
            spec["mounts"]
                .as_array_mut()
                .unwrap()
                .extend(mounts.as_array().unwrap().clone());
            for (key, value) in linux.as_object().unwrap() {
                spec["linux"][key] = value.clone();
            }
            let theirs = under_runc(rig, &spec, name);
            let _ = std::fs::remove_dir_all(&image);
            rig.fresh_image(name);
            let ours = match rig.create(spec).await {
                Ok(c) => {
                    rig.start(&c.id, "").await.unwrap();
                    let out = c.io.rest().await.0;
                    rig.exit(&c.id, "").await;
                    rig.delete(&c.id, "").await.unwrap();
                    Ok(out)
                }
                Err(error) => Err(error.1),
            };
            let lines = |out: &str| -> Vec<String> {
                out.lines()
                    .map(|line| comparable(line, &image))
                    .filter(|line| !is_known(line))
                    .collect()
            };
            match (&theirs, &ours) {
                (Ok(theirs), Ok(ours)) => {
                    let (theirs, ours) = (lines(theirs), lines(ours));
                    let only = |of: &[String], other: &[String]| -> Vec<String> {
                        of.iter()
                            .filter(|line| !other.contains(line))
                            .cloned()
                            .collect()
                    };
                    let (missing, more) = (only(&theirs, &ours), only(&ours, &theirs));
                    if !(missing.is_empty() && more.is_empty()) {
                        differences.push(format!("{name}:\n  runc {missing:#?}\n  husk {more:#?}"));
                    }
                }
                (Err(_), Err(_)) => {}
                _ => differences.push(format!("{name}: {theirs:?}\n  {ours:?}")),
            }
            let _ = std::fs::remove_dir_all(&image);
        }
        assert!(differences.is_empty(), "{}", differences.join("\n"));
    });
}
