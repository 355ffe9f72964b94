//! What differs between processor architectures. Only x86_64 has ever been run.

/// One architecture.
pub(crate) struct Arch {
    /// QEMU's program.
    pub program: &'static str,
    /// Debian's package of it.
    pub package: &'static str,
    /// The machine type: one that boots reliably when the host is loaded. (microvm does not: without HPET and PM timer its
    /// clock calibration hangs under TCG.) With a PM timer an HPET is not needed; with one, QEMU wakes up 250 times a second for as
    /// long as it lives, because the kernel leaves it counting when it takes another timer: an idle machine then takes four times
    /// the processor time, and the others of a pool are slower for it.
    pub machine: &'static str,
    /// Where the whole of a guest's memory begins for it, as QEMU saves that; 0 where its machine shows it in parts.
    pub memory_at: u64,
    /// The processor of a translated guest: all that QEMU knows of, but what takes longer than what a program does without it. x86_64's
    /// fast strings are one instruction that copies or clears any amount, and QEMU does that byte by byte: input to a command goes 2.3
    /// times as fast without. Both flags or none: Debian's kernel hangs while it boots with `fsrm` and without `erms`.
    pub translated_cpu: &'static str,
    /// The device that a kernel tells of a panic.
    pub panic: &'static str,
    /// The kernel's name for the first serial port.
    pub console: &'static str,
    /// What the kernel's command line has on this architecture only.
    pub cmdline: &'static str,
    /// What it has besides when the guest is translated. Such a guest does not execute speculatively as its code says: what its
    /// kernel does against that only costs. And its time-stamp counter is the host's clock: a watchdog would take a host that is
    /// slow to answer for a counter that is wrong, and every look at the clock would go through a device from then on.
    pub translated: &'static str,
}

#[cfg(target_arch = "x86_64")]
pub(crate) const ARCH: Arch = Arch {
    program: "qemu-system-x86_64",
    package: "qemu-system-x86",
    machine: "q35,sata=off,usb=off,vmport=off,hpet=off,suppress-vmdesc=on",
    memory_at: 0,
    translated_cpu: "max,erms=off,fsrm=off",
    panic: "pvpanic",
    console: "ttyS0",
    // `reboot=t` resets the machine by a triple fault, which needs no firmware.
    cmdline: "reboot=t no_timer_check",
    translated: "mitigations=off tsc=reliable",
};

#[cfg(target_arch = "aarch64")]
pub(crate) const ARCH: Arch = Arch {
    program: "qemu-system-aarch64",
    package: "qemu-system-arm",
    machine: "virt,gic-version=max,suppress-vmdesc=on",
    memory_at: 0x4000_0000,
    translated_cpu: "max",
    panic: "pvpanic-pci",
    console: "ttyAMA0",
    cmdline: "",
    translated: "mitigations=off",
};

#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
compile_error!("vmkit runs on x86_64 and aarch64");
