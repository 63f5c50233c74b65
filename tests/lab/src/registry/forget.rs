//! A registry that loses its memory.

use super::Registry;

impl Registry {
    /// Knows nothing any more, and tells nobody.
    pub(crate) fn forget(&self) {
        let mut state = self.state.lock();
        for name in state.endpoints.keys() {
            self.timers.cancel(&format!("registry/{name}"));
        }
        state.endpoints.clear();
        state.services.clear();
        state.owners = crate::policy::Owners::default();
    }
}
