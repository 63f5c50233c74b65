//! The one privilege that the daemon needs, CAP_NET_ADMIN, and the one that it
//! can use, CAP_NET_RAW, raised where they are only permitted.
//!
//! The image gives the binary the file capabilities `cap_net_admin,cap_net_raw+p`:
//! permitted, not effective. With `+ep` the kernel refuses to execute the program at all
//! where the container lacks the capability (execve(2), "Safety checking for
//! capability-dumb binaries"); with `+p` it starts and can say what is missing.
//!
//! One of the few files with `unsafe`: capget(2) and capset(2) have no wrapper
//! in libc.

use std::io;

/// linux/capability.h: `_LINUX_CAPABILITY_VERSION_3`.
const VERSION_3: u32 = 0x2008_0522;
/// linux/capability.h: `CAP_NET_ADMIN`.
pub const NET_ADMIN: u32 = 12;
/// linux/capability.h: `CAP_NET_RAW`.
pub const NET_RAW: u32 = 13;

#[repr(C)]
struct Header {
    version: u32,
    pid: i32,
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Data {
    effective: u32,
    permitted: u32,
    inheritable: u32,
}

/// What capget(2) says of the calling thread.
fn get() -> io::Result<[Data; 2]> {
    let mut header = Header {
        version: VERSION_3,
        pid: 0,
    };
    let mut data = [Data::default(); 2];
    // SAFETY: version 3 reads the header and writes two data structures; both
    // are live, of the layout of linux/capability.h, and owned by this frame.
    let got = unsafe { libc::syscall(libc::SYS_capget, &raw mut header, data.as_mut_ptr()) };
    if got != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(data)
}

fn set(data: &[Data; 2]) -> io::Result<()> {
    let mut header = Header {
        version: VERSION_3,
        pid: 0,
    };
    // SAFETY: as in `get`; capset only reads both.
    let set = unsafe { libc::syscall(libc::SYS_capset, &raw mut header, data.as_ptr()) };
    if set != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Makes a capability (below 32) effective for the calling thread, and for
/// those that it starts. True when it is effective afterwards; false when it is
/// not even permitted.
///
/// # Errors
///
/// What capget(2) or capset(2) says.
pub fn raise(capability: u32) -> io::Result<bool> {
    let mut data = get()?;
    let bit = 1 << capability;
    if data[0].effective & bit != 0 {
        return Ok(true);
    }
    if data[0].permitted & bit == 0 {
        return Ok(false);
    }
    data[0].effective |= bit;
    set(&data)?;
    Ok(true)
}

/// Takes a capability (below 32) from the calling thread for good.
///
/// # Errors
///
/// As [`raise`].
pub fn drop(capability: u32) -> io::Result<()> {
    let mut data = get()?;
    data[0].effective &= !(1 << capability);
    data[0].permitted &= !(1 << capability);
    set(&data)
}
