//! IPAM's bad days. Its table is in a database, which a restart keeps.

use super::Ipam;
use crate::fault::{Fault, Faults};

impl Faults for Ipam {
    fn inflict(&mut self, fault: &Fault) -> Result<(), String> {
        match fault {
            Fault::Refuse(status) => self.refuse(Some(status.clone())),
            Fault::Forget => self.forget(),
            on_the_line => {
                let server = self.0.server.lock();
                let (wire, _) = server.as_ref().ok_or("IPAM does not serve")?;
                return wire.inflict(on_the_line);
            }
        }
        Ok(())
    }

    fn recover(&mut self) -> Result<(), String> {
        self.refuse(None);
        let server = self.0.server.lock();
        let (wire, _) = server.as_ref().ok_or("IPAM does not serve")?;
        wire.revive().map_err(|error| format!("IPAM: {error}"))
    }
}
