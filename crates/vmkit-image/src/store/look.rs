//! What is in the store, and whether it is whole.

use std::fs;
use std::path::PathBuf;

use vmkit::{BootImage, Error, ErrorKind, Id, Result};

use super::Store;
use crate::digest;
use crate::files;
use crate::manifest::{self, DISK, FileEntry, INITRAMFS, ImageInfo, KERNEL, LOADER, Manifest, Name};
use crate::recipe::Recipe;

impl Store {
    pub(super) fn names(&self) -> Result<Vec<String>> {
        let files = self.entries("names")?;
        let names = files.iter().filter_map(|path| path.file_name()?.to_str()?.strip_suffix(".json"));
        Ok(names.map(str::to_owned).collect())
    }

    pub(super) fn entries(&self, part: &str) -> Result<Vec<PathBuf>> {
        let dir = self.dir.join(part);
        let failed = |error| Error::io(format!("{} cannot be read", dir.display()), error);
        let mut paths = Vec::new();
        for entry in fs::read_dir(&dir).map_err(failed)? {
            paths.push(entry.map_err(failed)?.path());
        }
        paths.sort();
        Ok(paths)
    }

    pub(super) fn name_file(&self, name: &str) -> Result<PathBuf> {
        Id::new(name)?;
        Ok(self.dir.join("names").join(format!("{name}.json")))
    }

    pub(super) fn image_dir(&self, digest: &str) -> PathBuf {
        self.dir.join("images").join(digest.replacen(':', "-", 1))
    }

    pub(super) fn record(&self, name: &str) -> Result<Name> {
        let record: Name = manifest::read(&self.name_file(name)?)?;
        let digits = record.image.strip_prefix("sha256:").unwrap_or_default();
        match digits.len() == 64 && digits.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            true => Ok(record),
            false => Err(Error::new(ErrorKind::Corrupt, format!("the record of image {name} has no digest"))),
        }
    }

    /// What a name means, checked as far as that is cheap.
    pub(super) fn find(&self, name: &str) -> Result<(Name, Manifest)> {
        let wrap = |error: Error| match error.kind() {
            ErrorKind::NotFound => self.corrupt(name, "its manifest is missing"),
            ErrorKind::Corrupt => self.corrupt(name, error.message()),
            _ => error,
        };
        if !self.name_file(name)?.exists() {
            return Err(self.not_found(name));
        }
        let record = match self.record(name) {
            // Removed between two looks.
            Err(error) if error.kind() == ErrorKind::NotFound => return Err(self.not_found(name)),
            other => other.map_err(wrap)?,
        };
        let manifest: Manifest = manifest::read(&self.image_dir(&record.image).join("manifest.json")).map_err(wrap)?;
        match self.shallow_problem(&record, &manifest) {
            Some(problem) => Err(self.corrupt(name, &problem)),
            None => Ok((record, manifest)),
        }
    }

    pub(super) fn shallow_problem(&self, record: &Name, manifest: &Manifest) -> Option<String> {
        if manifest.digest != record.image || manifest.clone().seal().digest != record.image {
            return Some("its manifest was changed".to_owned());
        }
        let dir = self.image_dir(&manifest.digest);
        let missing = |name: &&str| !manifest.files.contains_key(*name);
        let lacks =
            [KERNEL, INITRAMFS, DISK].into_iter().find(missing).map(|name| format!("its manifest has no {name}"));
        let differs = |(name, entry): (&String, &FileEntry)| match dir.join(name).metadata() {
            Ok(meta) if meta.len() == entry.size => None,
            Ok(meta) => Some(format!("its {name} has {} bytes instead of {}", meta.len(), entry.size)),
            Err(_) => Some(format!("its {name} is missing")),
        };
        lacks.or_else(|| manifest.files.iter().find_map(differs))
    }

    /// Whether the store's files are those of the manifest, byte by byte.
    pub(super) fn deep_problem(&self, manifest: &Manifest) -> Option<String> {
        let dir = self.image_dir(&manifest.digest);
        let there = manifest::read::<Manifest>(&dir.join("manifest.json")).ok();
        if there.is_none_or(|there| there.seal().digest != manifest.digest) {
            return Some("its manifest is missing or was changed".to_owned());
        }
        manifest.files.iter().find_map(|(name, entry)| match digest::of_file(&dir.join(name)) {
            Ok(digest) if digest == entry.digest => None,
            Ok(_) => Some(format!("its {name} was changed")),
            Err(error) => Some(error.message().to_owned()),
        })
    }

    pub(super) fn boot_image(&self, name: &str, manifest: &Manifest) -> BootImage {
        let dir = self.image_dir(&manifest.digest);
        let loader = if manifest.files.contains_key(LOADER) { LOADER } else { KERNEL };
        BootImage {
            name: name.to_owned(),
            digest: manifest.digest.clone(),
            loader: manifest.reboots.then(|| dir.join(loader)),
            kernel: dir.join(KERNEL),
            initramfs: dir.join(INITRAMFS),
            disk: Some(dir.join(DISK)),
            cmdline: manifest.cmdline.clone(),
        }
    }

    pub(super) fn describe(&self, name: String) -> ImageInfo {
        let (record, manifest, problems) = match self.find(&name) {
            Ok((record, manifest)) => (Some(record), Some(manifest), Vec::new()),
            Err(error) => (self.record(&name).ok(), None, vec![error.message().to_owned()]),
        };
        let digest = record.as_ref().map(|record| record.image.clone()).unwrap_or_default();
        let text = |get: fn(&Manifest) -> &String| manifest.as_ref().map(|m| get(m).clone()).unwrap_or_default();
        ImageInfo {
            size: if digest.is_empty() { 0 } else { files::occupied(&self.image_dir(&digest)) },
            virtual_size: manifest.as_ref().and_then(|m| m.files.get(DISK)).map_or(0, |disk| disk.size),
            created: record.as_ref().map_or(0, |record| record.built),
            source: record.map(|record| record.source).unwrap_or_default(),
            kernel_version: text(|m| &m.kernel_version),
            agent_version: text(|m| &m.agent_version),
            name,
            digest,
            problems,
        }
    }

    pub(super) fn not_found(&self, name: &str) -> Error {
        let how = match Recipe::BUILT_IN.contains(&name) {
            true => format!("build it with `vmkit image build {name}`"),
            false => {
                format!("`vmkit image ls` lists what there is; `vmkit image build {name} --rootfs DIR|TAR` makes it")
            }
        };
        Error::new(ErrorKind::NotFound, format!("there is no image {name}")).hint(how)
    }

    /// A build puts a whole image where the damaged one was, so its machines need not go first.
    pub(super) fn corrupt(&self, name: &str, problem: &str) -> Error {
        Error::new(ErrorKind::Corrupt, format!("image {name} is damaged: {problem}"))
            .hint(format!("build it again: {}", self.how_to_build(name)))
    }

    /// The command that makes this image again.
    pub(super) fn how_to_build(&self, name: &str) -> String {
        match self.record(name) {
            Ok(Name { recipe: Some(_), .. }) => format!("vmkit image build {name}"),
            Ok(Name { source, .. }) => format!("vmkit image build {name} --rootfs {source}"),
            Err(_) if Recipe::BUILT_IN.contains(&name) => format!("vmkit image build {name}"),
            Err(_) => format!("vmkit image build {name} --rootfs DIR|TAR"),
        }
    }
}
