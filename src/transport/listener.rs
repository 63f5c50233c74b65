//! Listening sockets.

use std::fs;
use std::io;
use std::net::TcpListener;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use log::warn;

use super::dial;
use super::error::ServerError;
use super::fd_socket::Socket;

/// Device and inode.
type FileId = (u64, u64);

/// A non-blocking listening socket. Dropping it removes the file of a unix
/// socket, unless somebody has replaced it.
pub(super) enum Listener {
    Unix {
        listener: UnixListener,
        path: PathBuf,
        /// The file that was made.
        file: FileId,
    },
    Tcp(TcpListener),
}

impl Listener {
    /// Makes the socket file, with its directory, for everybody to connect to:
    /// who may talk is decided by TLS, and the peers run as other users.
    pub(super) fn bind_unix(path: PathBuf) -> Result<Self, ServerError> {
        match Self::make(&path) {
            Ok((listener, file)) => Ok(Self::Unix {
                listener,
                path,
                file,
            }),
            Err((what, error)) => Err(ServerError(format!(
                "listening on unix:{}: {what}: {error}",
                path.display()
            ))),
        }
    }

    /// The listener with its file, or what failed.
    fn make(path: &Path) -> Result<(UnixListener, FileId), (&'static str, io::Error)> {
        let during = |what| move |error| (what, error);
        if let Some(directory) = path.parent() {
            fs::create_dir_all(directory).map_err(during("making the directory"))?;
        }
        remove_stale(path).map_err(during("removing what was there"))?;
        let listener = UnixListener::bind(path).map_err(during("binding"))?;
        fs::set_permissions(path, fs::Permissions::from_mode(0o777))
            .map_err(during("setting the mode"))?;
        let made = fs::symlink_metadata(path).map_err(during("reading it back"))?;
        listener
            .set_nonblocking(true)
            .map_err(during("making it non-blocking"))?;
        Ok((listener, (made.dev(), made.ino())))
    }

    pub(super) fn tcp(listener: TcpListener) -> Result<Self, ServerError> {
        listener
            .set_nonblocking(true)
            .map_err(|error| ServerError(format!("listening on TCP: {error}")))?;
        Ok(Self::Tcp(listener))
    }

    pub(super) fn raw(&self) -> RawFd {
        match self {
            Self::Unix { listener, .. } => listener.as_raw_fd(),
            Self::Tcp(listener) => listener.as_raw_fd(),
        }
    }

    /// The next connection; `WouldBlock` when there is none.
    pub(super) fn accept(&self) -> io::Result<Socket> {
        match self {
            Self::Unix { listener, .. } => {
                let (socket, _) = listener.accept()?;
                socket.set_nonblocking(true)?;
                Ok(Socket::Unix(socket))
            }
            Self::Tcp(listener) => {
                let (socket, _) = listener.accept()?;
                socket.set_nonblocking(true)?;
                dial::tune(&socket)?;
                Ok(Socket::Tcp(socket))
            }
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        let Self::Unix { path, file, .. } = self else {
            return;
        };
        let still_ours =
            fs::symlink_metadata(&*path).is_ok_and(|found| (found.dev(), found.ino()) == *file);
        if still_ours && let Err(error) = fs::remove_file(&*path) {
            warn!("removing unix:{}: {error}", path.display());
        }
    }
}

/// Removes the socket that a predecessor left; anything else is not ours.
fn remove_stale(path: &Path) -> io::Result<()> {
    match fs::symlink_metadata(path) {
        Ok(found) if found.file_type().is_socket() => fs::remove_file(path),
        Ok(_) => Err(io::Error::new(
            io::ErrorKind::AlreadyExists,
            "it exists and is no socket",
        )),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
    }
}
