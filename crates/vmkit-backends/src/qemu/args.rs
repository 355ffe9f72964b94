//! QEMU's command line for a machine.

use std::ffi::OsString;
use std::path::Path;

use serde_json::json;
use vmkit::{BootImage, Id, Spec};
use vmkit_agent::agent::PORT_NAME;

use super::arch::{ARCH, Arch};
use super::layout::{DISK, LAYER, MEMORY, QMP, QMP_PROBE, SERIAL};

/// How many processes can talk to one guest's agent at once; each has a port of its own.
pub(crate) const LINES: usize = 8;

/// What QEMU calls the machine's disk, and the image's under it.
pub(crate) const OVERLAY: &str = "disk";
pub(crate) const BASE: &str = "base";

/// The socket of an agent's line, in the machine's directory.
pub(crate) fn line_socket(line: usize) -> String {
    format!("agent.{line}.sock")
}

/// Boot, or go on from a saved execution.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Begin<'a> {
    Boot,
    Resume,
    /// From another's: its memory is this file, of which only what changes is the machine's own.
    Fork(&'a Path),
}

/// The arguments, for a QEMU whose working directory is the machine's. `layered`: its disk lies on a template's.
pub(crate) fn args(
    id: &Id,
    spec: &Spec,
    image: &BootImage,
    accelerator: &str,
    begin: Begin<'_>,
    layered: bool,
) -> Vec<OsString> {
    let mut args: Vec<OsString> = Vec::with_capacity(64);
    let mut add = |list: &[&str]| args.extend(list.iter().map(OsString::from));
    add(&["-name", id.as_str(), "-nodefaults", "-no-user-config", "-display", "none"]);
    add(&["-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"]);
    add(&["-M", &format!("{},memory-backend=m0", ARCH.machine)]);
    match accelerator {
        "kvm" => add(&["-accel", "kvm", "-cpu", "host"]),
        _ => add(&["-accel", "tcg,thread=multi", "-cpu", ARCH.translated_cpu]),
    }
    add(&["-smp", &spec.cpus.to_string(), "-m", &spec.memory_mib.to_string()]);
    let size = spec.memory_mib << 20;
    let memory = match begin {
        // Nobody writes to a template, whatever goes wrong.
        Begin::Fork(file) => json!({
            "qom-type": "memory-backend-file", "id": "m0", "size": size,
            "mem-path": file, "share": false, "readonly": true, "rom": "off",
        }),
        Begin::Boot | Begin::Resume => json!({
            "qom-type": "memory-backend-file", "id": "m0", "size": size, "mem-path": MEMORY, "share": true,
        }),
    };
    add(&["-object", &memory.to_string()]);
    for name in [QMP, QMP_PROBE] {
        add(&["-qmp", &format!("unix:{name},server=on,wait=off")]);
    }
    // A resumed machine goes on writing where it stopped.
    let append = if begin == Begin::Boot { "off" } else { "on" };
    add(&["-chardev", &format!("file,id=console,path={SERIAL},append={append}"), "-serial", "chardev:console"]);
    // No more queues than there are lines, and the one for a console, which is always number 0: each would be saved and loaded.
    add(&["-device", &format!("virtio-serial-pci,max_ports={}", LINES + 1)]);
    for line in 0..LINES {
        add(&["-chardev", &format!("socket,id=a{line},path={},server=on,wait=off", line_socket(line))]);
        add(&["-device", &format!("virtserialport,chardev=a{line},name={PORT_NAME}{line}")]);
    }
    if let Some(base) = &image.disk {
        // As JSON: a path may have commas.
        let file = |path: &Path| json!({ "driver": "file", "filename": path, "read-only": true });
        let mut backing = json!({ "node-name": BASE, "driver": "raw", "read-only": true, "file": file(base) });
        if layered {
            backing =
                json!({ "driver": "qcow2", "read-only": true, "file": file(Path::new(LAYER)), "backing": backing });
        }
        let disk = json!({
            "node-name": OVERLAY, "driver": "qcow2", "discard": "unmap",
            "file": { "driver": "file", "filename": DISK, "discard": "unmap" }, "backing": backing,
        });
        add(&["-blockdev", &disk.to_string()]);
        // A full disk is the guest's error, not a guest that stands still.
        add(&["-device", &format!("virtio-blk-pci,drive={OVERLAY},werror=report,rerror=report")]);
    }
    match &image.loader {
        // A kernel that gives up says so, and its machine ends: else nobody would know that from a guest that reboots.
        Some(_) => add(&["-device", ARCH.panic, "-action", "panic=exit-failure"]),
        None => add(&["-no-reboot"]),
    }
    // Saving and loading announce their ends.
    add(&["-global", "migration.x-events=on"]);
    if begin != Begin::Boot {
        add(&["-incoming", "defer", "-S"]);
    }
    // Who goes on from a saved execution needs a kernel only when its guest reboots. A loader costs nothing until then.
    let kernel = image.loader.as_ref().or((begin == Begin::Boot).then_some(&image.kernel));
    if let Some(kernel) = kernel {
        args.extend(["-kernel".into(), path(kernel), "-initrd".into(), path(&image.initramfs)]);
        args.extend(["-append".into(), cmdline(id, image, accelerator).into()]);
    }
    args
}

/// The kernel's command line. Beside console and root: no self-tests of ciphers, no waiting for quiet processors where an
/// expedited wait does, no audit: together a sixth of a boot under TCG. An image's own command line comes last and decides.
fn cmdline(id: &Id, image: &BootImage, accelerator: &str) -> String {
    // A kernel that gives up before it can say so is not to boot again and again: it stands still, and whoever waits for it reads
    // that on its console.
    let panic = if image.loader.is_some() { "panic=0" } else { "panic=-1" };
    let ours = "quiet cryptomgr.notests rcupdate.rcu_expedited=1 audit=0";
    let Arch { console, cmdline, translated, .. } = &ARCH;
    // With KVM the guest's kernel decides.
    let translated = if accelerator == "tcg" { *translated } else { "" };
    format!(
        "console={console} {ours} {panic} {translated} {cmdline} {} vmkit.ports={LINES} vmkit.hostname={id}",
        image.cmdline
    )
}

fn path(path: &Path) -> OsString {
    path.as_os_str().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use vmkit::Source;

    #[test]
    fn the_command_line_is_closed_and_complete() {
        let image = BootImage {
            name: "base".into(),
            digest: "sha256:0".into(),
            kernel: "/k,1".into(),
            loader: None,
            initramfs: "/i".into(),
            disk: Some("/odd,dir/disk".into()),
            cmdline: "vmkit.root=/dev/vda".into(),
        };
        let spec = Spec::new(Source::Boot(image.clone())).cpus(3).memory_mib(512);
        let id = Id::new("web").unwrap();
        let line_of = |image: &BootImage, begin, accelerator| -> Vec<String> {
            args(&id, &spec, image, accelerator, begin, false)
                .into_iter()
                .map(|arg| arg.into_string().unwrap())
                .collect()
        };
        let line = |begin, accelerator| line_of(&image, begin, accelerator);
        let boot = line(Begin::Boot, "tcg");
        let text = boot.join(" ");
        for part in [
            "-sandbox on,",
            "-nodefaults",
            "-smp 3 -m 512",
            "\"size\":536870912",
            "vmkit.hostname=web",
            "/odd,dir/disk",
            "-kernel /k,1",
            "name=org.vmkit.agent.7",
        ] {
            assert!(text.contains(part), "{part} is missing in {text}");
        }
        assert!(!text.contains("-incoming") && !text.contains("-net"));
        let resume = line(Begin::Resume, "tcg");
        assert!(resume.contains(&"defer".to_owned()) && !resume.contains(&"-kernel".to_owned()), "{resume:?}");
        assert!(text.contains("mitigations=off"));
        // Without a loader, a guest that reboots or panics ends; with one, the first comes up again, whatever it came from.
        assert!(text.contains("-no-reboot") && text.contains(" panic=-1 ") && !text.contains("pvpanic"), "{text}");
        let loaded = BootImage { loader: Some("/l".into()), ..image.clone() };
        for begin in [Begin::Boot, Begin::Resume, Begin::Fork(Path::new("/m"))] {
            let text = line_of(&loaded, begin, "tcg").join(" ");
            for part in [
                "-kernel /l -initrd /i -append",
                "vmkit.ports=8 vmkit.hostname=web",
                "pvpanic",
                "panic=exit-failure",
                " panic=0 ",
            ] {
                assert!(text.contains(part), "{part} is missing in {text}");
            }
            assert!(!text.contains("-no-reboot") && text.contains("-incoming") == (begin != Begin::Boot), "{text}");
        }
        let kvm = line(Begin::Boot, "kvm").join(" ");
        assert!(text.contains(&format!("-cpu {}", ARCH.translated_cpu)), "{text}");
        assert!(kvm.contains("-cpu host") && !kvm.contains("mitigations") && !kvm.contains("tsc="), "{kvm}");
    }
}
