//! What a machine boots, or goes on from a boot of.

use std::fs::File;

use vmkit::{BootImage, Error, ErrorKind, Result, Source, Spec};

/// The image of a spec that QEMU can boot.
pub(super) fn of(spec: &Spec) -> Result<&BootImage> {
    match &spec.source {
        Source::Boot(image) => Ok(image),
        Source::Alias(name) => {
            Err(Error::new(ErrorKind::InvalidArgument, format!("QEMU cannot boot the name {name:?}"))
                .hint("give the files of an image: Source::Boot"))
        }
    }
}

/// Its files are there. Also for who does not boot it now: the next start may.
pub(super) fn check(image: &BootImage) -> Result<()> {
    let files = [Some(&image.kernel), image.loader.as_ref(), Some(&image.initramfs), image.disk.as_ref()];
    for file in files.into_iter().flatten() {
        if let Err(error) = File::open(file) {
            let message = format!("image {} has lost its file {}", image.name, file.display());
            return Err(Error::new(ErrorKind::Corrupt, message).caused_by(error).hint(format!(
                "build it again: vmkit image build {}; or, if the state directory was moved, move it back",
                image.name
            )));
        }
    }
    Ok(())
}
