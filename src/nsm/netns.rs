//! The network namespace that connections end in: the own one, as a descriptor
//! for nsmgr and as the URL that names it.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};

/// Of the calling thread: a thread of this process may be elsewhere, the main
/// thread's is the pod's.
const PATH: &str = "/proc/thread-self/ns/net";

/// The own network namespace.
#[derive(Debug)]
pub(super) struct Netns {
    file: File,
    url: String,
}

impl Netns {
    /// Takes the namespace of the calling thread.
    ///
    /// # Errors
    ///
    /// When /proc is not mounted, or no descriptor is left.
    pub(super) fn own() -> io::Result<Self> {
        let file = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_PATH)
            .open(PATH)
            .map_err(|error| io::Error::new(error.kind(), format!("open {PATH}: {error}")))?;
        let status = file.metadata()?;
        // The form of edwarnicke/grpcfd url.go: both numbers decimal.
        let url = format!("inode://{}/{}", status.dev(), status.ino());
        Ok(Self { file, url })
    }

    /// What goes into `inodeURL`.
    pub(super) fn url(&self) -> &str {
        &self.url
    }

    /// A descriptor to pass on.
    ///
    /// # Errors
    ///
    /// When the process has no descriptor left.
    pub(super) fn descriptor(&self) -> io::Result<OwnedFd> {
        Ok(self.file.try_clone()?.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_url_names_what_the_descriptor_is() {
        let netns = Netns::own().unwrap();
        let passed = File::from(netns.descriptor().unwrap()).metadata().unwrap();
        assert_eq!(
            netns.url(),
            format!("inode://{}/{}", passed.dev(), passed.ino())
        );
        let named = std::fs::metadata(PATH).unwrap();
        assert_eq!((passed.dev(), passed.ino()), (named.dev(), named.ino()));
    }
}
