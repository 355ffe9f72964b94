//! The images of one state directory.
//!
//! ```text
//! lock                    held by whoever changes the store
//! hold                    held shared by whoever is about to refer to an image
//! images/sha256-…/        manifest.json kernel loader initramfs disk; read-only
//! names/NAME.json         which image a name means
//! kernels/PACKAGE_…/      kernels and modules, unpacked; images link to them
//! work/                   what is being made; whatever is in it when the lock is taken is somebody's wreck
//! ```

mod collect;
mod look;

use std::fs;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use vmkit::{BootImage, Error, ErrorKind, Id, Result};

use crate::agent::Agent;
use crate::builder;
use crate::files;
use crate::lock::Lock;
use crate::manifest::{self, FORMAT, ImageInfo, Manifest, Name};
use crate::progress::{Cancel, Phase, Progress};
use crate::recipe::Recipe;
use crate::run::Work;

/// Images by name, in a directory. Any number of processes may use one at once.
#[derive(Clone, Debug)]
pub struct Store {
    dir: PathBuf,
}

/// While it is held, no image is collected. Take it before [`Store::get`] or [`Store::ensure`], and drop it when the machine
/// made from the image is on record.
#[derive(Debug)]
pub struct Hold {
    _lock: Lock,
}

impl Store {
    /// Opens the store in a directory, which is made when it is not there.
    ///
    /// # Errors
    /// When the directory cannot be made or written to.
    pub fn open(dir: impl Into<PathBuf>) -> Result<Store> {
        let dir = dir.into();
        files::make_dir(&dir)?;
        let dir = dir.canonicalize().map_err(|error| Error::io(format!("{} cannot be read", dir.display()), error))?;
        for part in ["images", "names", "kernels"] {
            files::make_dir(&dir.join(part))?;
        }
        Ok(Store { dir })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.dir
    }

    /// Keeps every image from being collected.
    ///
    /// # Errors
    /// When the store cannot be written to.
    pub fn hold(&self) -> Result<Hold> {
        Ok(Hold { _lock: Lock::shared(&self.dir.join("hold"))? })
    }

    /// All images, by name. A damaged one is listed with its problems.
    ///
    /// # Errors
    /// When the store cannot be read.
    pub fn list(&self) -> Result<Vec<ImageInfo>> {
        Ok(self.names()?.into_iter().map(|name| self.describe(name)).collect())
    }

    /// The image of this name. Its files are there and have the right size; [`Store::verify`] reads them.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`]; [`ErrorKind::Corrupt`] when something is damaged.
    pub fn get(&self, name: &str) -> Result<BootImage> {
        let (_, manifest) = self.find(name)?;
        Ok(self.boot_image(name, &manifest))
    }

    /// What [`Store::list`] says of one image.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`]. Damage is not an error here, but listed.
    pub fn info(&self, name: &str) -> Result<ImageInfo> {
        match self.name_file(name)?.exists() {
            true => Ok(self.describe(name.to_owned())),
            false => Err(self.not_found(name)),
        }
    }

    /// Whether an image of this digest is there, whatever it is called.
    pub fn has(&self, digest: &str) -> bool {
        self.image_dir(digest).is_dir()
    }

    /// Whether the image has this agent in the form that this version of vmkit would give it. Where it has not,
    /// [`Store::ensure`] sees to it.
    ///
    /// # Errors
    /// As [`Store::get`].
    pub fn is_current(&self, name: &str, agent: &Agent) -> Result<bool> {
        Ok(self.find(name)?.1.is_current(agent))
    }

    /// Reads an image's files and compares their digests.
    ///
    /// # Errors
    /// As [`Store::get`].
    pub fn verify(&self, name: &str) -> Result<()> {
        let (_, manifest) = self.find(name)?;
        match self.deep_problem(&manifest) {
            Some(problem) => Err(self.corrupt(name, &problem)),
            None => Ok(()),
        }
    }

    /// Makes an image and gives it the name, which may have meant another until then. Waits for other builds.
    ///
    /// # Errors
    /// What the tools said; [`ErrorKind::Cancelled`]. Then the name means what it meant before.
    pub fn build(
        &self,
        name: &str,
        recipe: &Recipe,
        cancel: &Cancel,
        progress: &dyn Fn(Progress<'_>),
    ) -> Result<BootImage> {
        Id::new(name)?;
        let (_lock, work) = self.begin(cancel, progress)?;
        self.build_locked(name, recipe, &work)
    }

    /// The image of this name, with this agent: built when it is a built-in one and not there, and brought up to date when it
    /// has another agent, which takes no longer than writing an initramfs. Machines that were made from the older image keep it.
    ///
    /// # Errors
    /// As [`Store::get`] and [`Store::build`].
    pub fn ensure(
        &self,
        name: &str,
        agent: &Agent,
        cancel: &Cancel,
        progress: &dyn Fn(Progress<'_>),
    ) -> Result<BootImage> {
        let known = |found: &Result<(Name, Manifest)>| match found {
            Ok((_, manifest)) => manifest.is_current(agent),
            // Somebody's own image, or a damaged one: a build is not ours to decide on.
            Err(error) => error.kind() != ErrorKind::NotFound || !Recipe::BUILT_IN.contains(&name),
        };
        let mut found = self.find(name);
        if !known(&found) {
            let (_lock, work) = self.begin(cancel, progress)?;
            // Whoever had the lock before may have done it.
            found = self.find(name);
            match &found {
                _ if known(&found) => {}
                // Somebody's own image of an older form is as good as it was; how to make it again only he knows.
                Ok((record, manifest))
                    if manifest.format == FORMAT || (manifest.format < FORMAT && record.recipe.is_none()) =>
                {
                    return self.exchange_locked(name, record, manifest, agent, &work);
                }
                Ok((Name { recipe: None, .. }, _)) => {
                    return Err(Error::new(
                        ErrorKind::Unsupported,
                        format!("image {name} is from another version of vmkit"),
                    )
                    .hint(format!("build it again: {}", self.how_to_build(name))));
                }
                Ok((Name { recipe: Some(recipe), .. }, _)) => {
                    return self.build_locked(name, &Recipe::built_in(recipe, agent.clone())?, &work);
                }
                Err(_) => return self.build_locked(name, &Recipe::built_in(name, agent.clone())?, &work),
            }
        }
        let (_, manifest) = found?;
        Ok(self.boot_image(name, &manifest))
    }

    /// Takes the name away, and then collects. `in_use` says whether a machine refers to a digest.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`]; [`ErrorKind::Busy`] when a machine uses the image.
    pub fn remove(&self, name: &str, in_use: &dyn Fn(&str) -> bool) -> Result<()> {
        let (_lock, _work) = self.begin(&Cancel::new(), &|_| {})?;
        let path = self.name_file(name)?;
        if !path.exists() {
            return Err(self.not_found(name));
        }
        if let Ok(record) = manifest::read::<Name>(&path) {
            let others = self.names()?.into_iter().filter(|other| other != name);
            let shared = others.filter_map(|other| self.record(&other).ok()).any(|other| other.image == record.image);
            if !shared && in_use(&record.image) {
                return Err(Error::new(ErrorKind::Busy, format!("image {name} is in use by a machine"))
                    .hint("delete its machines first; `vmkit ls` lists them"));
            }
        }
        fs::remove_file(&path).map_err(|error| Error::io(format!("{} cannot be removed", path.display()), error))?;
        files::sync_dir(&self.dir.join("names"))?;
        self.collect_locked(in_use).map(drop)
    }

    /// Removes the images that neither a name nor a machine refers to, and kernels that no image has. Returns the bytes that
    /// were freed; 0 also when somebody [holds](Store::hold) the images just now.
    ///
    /// # Errors
    /// When the store cannot be written to.
    pub fn collect(&self, in_use: &dyn Fn(&str) -> bool) -> Result<u64> {
        let (_lock, _work) = self.begin(&Cancel::new(), &|_| {})?;
        self.collect_locked(in_use)
    }

    /// Takes the lock, and sweeps what a killed build left.
    fn begin<'a>(&self, cancel: &'a Cancel, progress: &'a dyn Fn(Progress<'_>)) -> Result<(Lock, Work<'a>)> {
        // A name of its own: tools of a killed build live on for a moment, and must not find this build's files under their own
        // files' names.
        let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let own = format!("{}-{}", std::process::id(), since.as_nanos());
        let work = Work::new(self.dir.join("work").join(own), cancel, progress);
        let waiting = || work.report(Phase::Waiting, "another build is under way");
        let lock = Lock::exclusive(&self.dir.join("lock"), cancel, &waiting)?;
        self.sweep()?;
        Ok((lock, work))
    }

    fn sweep(&self) -> Result<()> {
        files::remove_tree(&self.dir.join("work"))
    }

    /// Makes an image in a directory that is swept afterwards, and names it.
    fn make(
        &self,
        name: &str,
        work: &Work<'_>,
        how: impl FnOnce(&Path) -> Result<(Name, Manifest)>,
    ) -> Result<BootImage> {
        let image = work.path("image");
        let made = files::make_dir(&image)
            .and_then(|()| files::make_private(&self.dir.join("work")))
            .and_then(|()| how(&image))
            .and_then(|(record, manifest)| self.publish(name, &record, &manifest, &image, work));
        // Also after a failure: a gigabyte of scratch files should not wait for the next build. Where it does not succeed, the
        // next build sees to it: the image is there.
        let _ = self.sweep();
        made
    }

    fn build_locked(&self, name: &str, recipe: &Recipe, work: &Work<'_>) -> Result<BootImage> {
        self.make(name, work, |image| {
            let manifest = builder::build(work, recipe, &self.dir.join("kernels"), image)?;
            let record = Name {
                image: manifest.digest.clone(),
                built: manifest::now(),
                recipe: recipe.name().map(str::to_owned),
                source: recipe.source(),
            };
            Ok((record, manifest))
        })
    }

    fn exchange_locked(
        &self,
        name: &str,
        record: &Name,
        old: &Manifest,
        agent: &Agent,
        work: &Work<'_>,
    ) -> Result<BootImage> {
        // The new image shares the old one's files, and is not to share damage under a name that says it is whole.
        if let Some(problem) = self.deep_problem(old) {
            return Err(self.corrupt(name, &problem));
        }
        self.make(name, work, |image| {
            let manifest = builder::exchange_agent(work, &self.image_dir(&old.digest), old, agent, image)?;
            Ok((Name { image: manifest.digest.clone(), ..record.clone() }, manifest))
        })
    }

    fn publish(
        &self,
        name: &str,
        record: &Name,
        manifest: &Manifest,
        image: &Path,
        work: &Work<'_>,
    ) -> Result<BootImage> {
        match self.deep_problem(manifest) {
            Some(_) => builder::place(work, image, &self.image_dir(&manifest.digest))?,
            // It was there before; whoever put it there may have died before this.
            None => files::sync_dir(&self.dir.join("images"))?,
        }
        files::replace(&self.name_file(name)?, &work.path("name"), &manifest::text(record))?;
        Ok(self.boot_image(name, manifest))
    }
}
