//! The one privilege that the daemon needs, CAP_NET_ADMIN, raised where it is
//! only permitted.
//!
//! The image gives the binary the file capability `cap_net_admin+p`: permitted,
//! not effective. With `+ep` the kernel refuses to execute the program at all
//! where the container lacks the capability (execve(2), "Safety checking for
//! capability-dumb binaries"); with `+p` it starts and can say what is missing.
//!
//! One of the few files with `unsafe`: capget(2) and capset(2) have no wrapper
//! in libc.

use std::io;

/// linux/capability.h: `_LINUX_CAPABILITY_VERSION_3`.
const VERSION_3: u32 = 0x2008_0522;
/// linux/capability.h: `CAP_NET_ADMIN`.
const NET_ADMIN: u32 = 12;

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

/// Makes CAP_NET_ADMIN effective for the calling thread, and for those that it
/// starts. True when it is effective afterwards; false when it is not even
/// permitted, and every change of the kernel will be refused with EPERM.
///
/// # Errors
///
/// What capget(2) or capset(2) says.
pub fn raise_net_admin() -> io::Result<bool> {
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
    let bit = 1 << NET_ADMIN;
    if data[0].effective & bit != 0 {
        return Ok(true);
    }
    if data[0].permitted & bit == 0 {
        return Ok(false);
    }
    data[0].effective |= bit;
    // SAFETY: as above; capset only reads both.
    let set = unsafe { libc::syscall(libc::SYS_capset, &raw mut header, data.as_ptr()) };
    if set != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(true)
}
