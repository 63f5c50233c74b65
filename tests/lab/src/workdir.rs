//! A directory for the sockets and files of one run.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

/// Not below `/tmp`, where the daemon has a directory of its own.
const BASE: &str = "/var/tmp";
const PREFIX: &str = "meridio-lab-";

static NEXT: AtomicU32 = AtomicU32::new(0);

/// Removed with all that is in it when dropped.
#[derive(Debug)]
pub struct WorkDir(PathBuf);

impl WorkDir {
    /// Makes a directory of a short name: socket paths have 107 bytes. Removes
    /// what runs that were killed have left.
    pub fn new() -> io::Result<Self> {
        sweep();
        let number = NEXT.fetch_add(1, Ordering::SeqCst);
        let path = Path::new(BASE).join(format!("{PREFIX}{}-{number}", std::process::id()));
        fs::create_dir(&path).map_err(|error| {
            io::Error::new(error.kind(), format!("{}: {error}", path.display()))
        })?;
        Ok(Self(path))
    }

    /// The directory.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// Removes the directories of this process at once, for an end that runs
    /// no destructors.
    pub fn remove_all() {
        remove(|pid| pid == std::process::id());
    }
}

impl Drop for WorkDir {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn sweep() {
    remove(|pid| !Path::new("/proc").join(pid.to_string()).exists());
}

fn remove(chosen: impl Fn(u32) -> bool) {
    let Ok(entries) = fs::read_dir(BASE) else {
        return;
    };
    for entry in entries.flatten() {
        let name = entry.file_name();
        let pid = (name.to_str())
            .and_then(|name| name.strip_prefix(PREFIX)?.split_once('-'))
            .and_then(|(pid, _)| pid.parse().ok());
        if pid.is_some_and(&chosen) {
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}
