//! NSP's bad days. A restart keeps the VIPs, which are in its configuration;
//! one that forgot them tells of none until it has read it again.

use super::Nsp;
use crate::fault::{Fault, Faults};

impl Faults for Nsp {
    fn inflict(&mut self, fault: &Fault) -> Result<(), String> {
        match fault {
            Fault::Refuse(status) => {
                self.shared.state.lock().refusal = Some(status.clone());
                self.end_streams(status);
            }
            Fault::DropStreams => self.drop_streams(),
            Fault::Forget => {
                self.begin_empty(true);
                self.drop_streams();
            }
            on_the_line => {
                let server = self.server.lock();
                let (wire, _) = server.as_ref().ok_or("NSP does not serve")?;
                return wire.inflict(on_the_line);
            }
        }
        Ok(())
    }

    fn recover(&mut self) -> Result<(), String> {
        self.shared.state.lock().refusal = None;
        self.begin_empty(false);
        self.repeat_vips();
        let server = self.server.lock();
        let (wire, _) = server.as_ref().ok_or("NSP does not serve")?;
        wire.revive().map_err(|error| format!("NSP: {error}"))
    }
}
