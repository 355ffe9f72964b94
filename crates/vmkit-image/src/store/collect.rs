//! What nobody refers to any more goes.

use std::collections::BTreeSet;

use vmkit::Result;

use super::Store;
use crate::files;
use crate::kernel;
use crate::lock::Lock;
use crate::manifest::{self, Manifest};

impl Store {
    pub(super) fn collect_locked(&self, in_use: &dyn Fn(&str) -> bool) -> Result<u64> {
        let Some(_hold) = Lock::try_exclusive(&self.dir.join("hold"))? else { return Ok(0) };
        let mut named = BTreeSet::new();
        for name in self.names()? {
            match self.record(&name) {
                Ok(record) => named.insert(record.image),
                // Nobody knows what a damaged name means, so nothing is thrown away until it is removed.
                Err(_) => return Ok(0),
            };
        }
        let mut freed = 0;
        let mut kernels = BTreeSet::new();
        for dir in self.entries("images")? {
            let digest = dir.file_name().and_then(|name| name.to_str()).unwrap_or_default().replacen('-', ":", 1);
            if named.contains(&digest) || in_use(&digest) {
                let manifest = manifest::read::<Manifest>(&dir.join("manifest.json")).ok();
                kernels.extend(manifest.map(|manifest| manifest.kernel_version));
                continue;
            }
            freed += files::own(&dir);
            files::remove_tree(&dir)?;
        }
        let newest = kernel::newest(&self.dir.join("kernels"));
        for dir in self.entries("kernels")? {
            let used = kernel::cached_version(&dir).is_some_and(|version| kernels.contains(&version));
            if !used && newest.as_ref() != Some(&dir) {
                freed += files::own(&dir);
                files::remove_tree(&dir)?;
            }
        }
        Ok(freed)
    }
}
