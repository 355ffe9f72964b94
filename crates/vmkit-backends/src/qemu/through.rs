//! A large file that is written to disk while it is still being written: what is left at its end is little.

use std::fs::File;
use std::io;
use std::sync::mpsc::{SyncSender, sync_channel};
use std::thread::{self, JoinHandle};

/// How much is written before a part of it goes to disk. Of what is smaller nothing does: it is on disk soon enough at its end.
const PART: u64 = 64 << 20;

/// Sends parts of a file to disk, on a thread of its own. Whoever wrote the file still has to [`finish`](Through::finish), and to see
/// to the rest of it.
pub(super) struct Through {
    /// Until the thread has it.
    file: Option<File>,
    /// Bytes that were written since the last part.
    since: u64,
    thread: Option<(SyncSender<()>, JoinHandle<io::Result<()>>)>,
}

impl Through {
    /// For a file that somebody writes to.
    pub fn new(file: &File) -> io::Result<Through> {
        Ok(Through { file: Some(file.try_clone()?), since: 0, thread: None })
    }

    /// So many bytes more were written. Returns at once, also when a part is still under way: the next one is larger then.
    pub fn wrote(&mut self, bytes: u64) -> io::Result<()> {
        self.since += bytes;
        if self.since < PART {
            return Ok(());
        }
        if let Some(file) = self.file.take() {
            let (tell, told) = sync_channel(0);
            let thread = thread::Builder::new().name("vmkit-through".into());
            let thread = thread.spawn(move || told.iter().try_for_each(|()| file.sync_data()))?;
            self.thread = Some((tell, thread));
        }
        if self.thread.as_ref().is_some_and(|(tell, _)| tell.try_send(()).is_ok()) {
            self.since = 0;
        }
        Ok(())
    }

    /// Returns when no part is under way any more.
    ///
    /// # Errors
    /// What writing any part failed with: nobody is told that a second time.
    pub fn finish(self) -> io::Result<()> {
        let Some((tell, thread)) = self.thread else { return Ok(()) };
        drop(tell);
        thread.join().unwrap_or_else(|_| Err(io::Error::other("writing to disk panicked")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn what_is_small_takes_no_thread_and_what_is_large_takes_one() {
        let mut file = tempfile::tempfile().unwrap();
        let mut through = Through::new(&file).unwrap();
        file.write_all(&[7; 4096]).unwrap();
        through.wrote(PART - 1).unwrap();
        assert!(through.thread.is_none());
        for _ in 0..100 {
            through.wrote(PART).unwrap();
        }
        assert!(through.thread.is_some());
        through.finish().unwrap();
    }

    #[test]
    fn what_a_part_failed_with_is_told() {
        // Nothing of a pipe can be on a disk.
        let (_reader, writer) = std::io::pipe().unwrap();
        let mut through = Through::new(&File::from(std::os::fd::OwnedFd::from(writer))).unwrap();
        while through.thread.as_ref().is_none_or(|(_, thread)| !thread.is_finished()) {
            through.wrote(PART).unwrap();
        }
        assert_eq!(through.finish().unwrap_err().kind(), io::ErrorKind::InvalidInput);
    }
}
