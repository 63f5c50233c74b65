//! Descriptors that are passed to peers, and the URLs that name them.

use std::fs::OpenOptions;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;

/// This process's network namespace. `nse` never leaves it, so its own is the
/// one of the bridge.
pub const NETNS: &str = "/proc/thread-self/ns/net";

/// A descriptor that stands for a file without access to it, with the URL by
/// which the receiver finds it (edwarnicke/grpcfd, url.go).
#[derive(Debug)]
pub struct Named {
    /// The descriptor, opened with `O_PATH`.
    pub fd: OwnedFd,
    /// `inode://<device>/<inode>`, both decimal.
    pub url: String,
}

/// Opens `path` so that it can be passed on.
///
/// # Errors
///
/// When it does not exist or the process has no descriptor left; the error
/// names the path.
pub fn open(path: &Path) -> io::Result<Named> {
    let named = |error: io::Error| {
        io::Error::new(
            error.kind(),
            format!("open {} as O_PATH: {error}", path.display()),
        )
    };
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_PATH)
        .open(path)
        .map_err(named)?;
    let meta = file.metadata().map_err(named)?;
    Ok(Named {
        url: format!("inode://{}/{}", meta.dev(), meta.ino()),
        fd: file.into(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_namespace_and_what_is_missing() {
        let named = open(Path::new(NETNS)).unwrap();
        let meta = std::fs::metadata("/proc/self/ns/net").unwrap();
        assert_eq!(named.url, format!("inode://{}/{}", meta.dev(), meta.ino()));
        let error = open(Path::new("/nowhere/at/all")).unwrap_err().to_string();
        assert!(
            error.starts_with("open /nowhere/at/all as O_PATH: "),
            "{error}"
        );
    }
}
