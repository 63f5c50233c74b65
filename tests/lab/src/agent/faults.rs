//! The SPIRE agent's bad days. A restart keeps its SVIDs; one that forgot
//! them has new ones of the same authority.

use super::Agent;
use crate::fault::{Fault, Faults};

impl Faults for Agent {
    fn inflict(&mut self, fault: &Fault) -> Result<(), String> {
        match fault {
            Fault::Kill => self.stop(),
            Fault::Restart => {
                self.stop();
                self.restart();
            }
            Fault::Refuse(status) => self.refuse(Some(status)),
            Fault::DropStreams => self.drop_streams(),
            Fault::Forget => {
                self.shared.state.lock().renew();
                self.drop_streams();
            }
            on_the_line => {
                let (wire, _) = self.server.as_ref().ok_or("the agent does not serve")?;
                return wire.inflict(on_the_line);
            }
        }
        Ok(())
    }

    fn recover(&mut self) -> Result<(), String> {
        self.refuse(None);
        self.restart();
        let (wire, _) = self.server.as_ref().ok_or("the agent does not serve")?;
        wire.revive().map_err(|error| format!("agent: {error}"))
    }
}
